"""Places of a model's linears in a grid: layers along x, the linears of a layer along y.

Rows and columns have the names of Hugging Face modules, which users know, also for hybrid models whose layers hold
different linears. The policy map and the heatmaps of a run report use it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

_LAYER = re.compile(r"\blayers\.(\d+)\.")
OUTSIDE = "head"
"""Column of the linears outside of the layers."""


class PlacedLinear(Protocol):
    """A linear as ``models.families`` describes it."""

    megatron: str
    hf: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class GridRow:
    """A row of the grid: a kind of layer and the names of the weights that make up the linear."""

    kind: str
    """Kind of the linear in policies, such as "attention" or "expert"."""
    label: str
    """Last parts of the Hugging Face names, such as "q_proj, k_proj, v_proj"."""


@dataclass(frozen=True)
class LinearGrid:
    """Rows, columns, and the Megatron weight names in each cell: several for the experts of a layer."""

    rows: Sequence[GridRow]
    columns: Sequence[str]
    """Layer numbers as in the Hugging Face names, and ``OUTSIDE`` at the end."""
    cells: Mapping[tuple[GridRow, str], Sequence[str]]


def linear_grid(linears: Iterable[PlacedLinear]) -> LinearGrid:
    """Place linears in a grid. Rows are in the order in which the model first has them.

    Example:
        >>> from megatron_qad.models.families.base import ParamMapping
        >>> query = "model.layers.0.self_attn.q_proj.weight"
        >>> linear_grid([ParamMapping("decoder.layers.0.linear_qkv.weight", (query,), "attention", (8, 8))]).columns
        ['0']
    """
    cells: dict[tuple[GridRow, str], list[str]] = {}
    for linear in linears:
        found = _LAYER.search(linear.hf[0])
        row = GridRow(linear.kind.replace("_", " "), ", ".join(map(_last_part, linear.hf)))
        cells.setdefault((row, found[1] if found else OUTSIDE), []).append(linear.megatron)
    columns = sorted({column for _, column in cells}, key=lambda c: (c == OUTSIDE, 0 if c == OUTSIDE else int(c)))
    found = list(dict.fromkeys(row for row, _ in cells))
    rows = sorted(found, key=lambda row: _order(row, found))
    return LinearGrid(rows, columns, cells)


def _order(row: GridRow, rows: Sequence[GridRow]) -> tuple[bool, int]:
    """Sort key that keeps the rows of a kind together and puts those outside of the layers at the end."""
    return row.kind == OUTSIDE, min(i for i, other in enumerate(rows) if other.kind == row.kind)


def _last_part(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]
