"""The table of a resolved policy: every linear with its shape, its format, and its bytes before and after.

Bytes after are those of a packed checkpoint: codes, block scales and the float32 scale of each tensor and of its input.
Repeated experts can be folded into one row.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.quantization.rules import Linear, module_of

BF16_BYTES = 2
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class ShapedLinear(Linear, Protocol):
    """A linear whose weight's shape is known; ``models.families`` provides it."""

    shape: tuple[int, ...]
    hf: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One linear, or ``num`` experts that differ in nothing but their index."""

    layer: int | None
    kind: str
    module: str
    """Megatron's name."""
    hf: tuple[str, ...]
    """Hugging Face modules that the weight holds."""
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    """In BF16; 0 for a tied head, which is no tensor of its own."""
    bytes_after: int
    is_tied: bool = False
    num: int = 1


def format_rows(linears: Sequence[ShapedLinear], formats: dict[str, str]) -> list[Row]:
    """A row for every linear, in model order. ``formats``: by Megatron weight name (``policy.resolve``).

    Raises:
        QADError: a linear whose inner dimension is no multiple of its format's blocks.
    """
    return [_row(linear, formats[linear.megatron]) for linear in linears]


def _row(linear: ShapedLinear, name: str) -> Row:
    fmt, (rows, columns) = FORMATS[name], linear.shape
    if columns % (block := fmt.block_size):
        raise QADError(
            f"{linear.megatron} has {columns} columns, and {name} needs a multiple of {block}; give it another format"
        )
    before, after = BF16_BYTES * rows * columns, fmt.num_bytes(rows, columns, num_linears=len(linear.hf))
    if linear.is_tied:
        before = after = 0
    modules = tuple(tensor.removesuffix(".weight") for tensor in linear.hf)
    return Row(linear.layer, linear.kind, module_of(linear), modules, linear.shape, name, before, after, linear.is_tied)


def fold_experts(rows: Sequence[Row]) -> list[Row]:
    """Rows of one layer that differ only in the expert's index as one: ``experts.{0..127}.linear_fc1``."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (row.layer, row.kind, _EXPERT.sub(".experts.{}.", row.module), row.shape, row.format)
        groups.setdefault(key, []).append(row)
    return [_fold(group, key[2]) for key, group in groups.items()]


def _fold(group: list[Row], pattern: str) -> Row:
    if len(group) == 1:
        return group[0]
    indices = _ranges([int(_EXPERT.search(row.module)[1]) for row in group])
    return replace(
        group[0],
        module=pattern.replace("{}", "{" + indices + "}"),
        bytes_before=sum(row.bytes_before for row in group),
        bytes_after=sum(row.bytes_after for row in group),
        num=len(group),
    )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0..2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("..".join(map(str, part)) for part in parts)


@dataclass(frozen=True)
class Total:
    """What the linears of one format add up to."""

    num_linears: int = 0
    num_weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


def totals(rows: Sequence[Row]) -> dict[str, Total]:
    """By format, in the registry's order. A tied head counts as a linear without weights."""
    found: dict[str, Total] = {}
    for row in rows:
        total = found.get(row.format, Total())
        found[row.format] = Total(
            total.num_linears + row.num,
            total.num_weights + row.bytes_before // BF16_BYTES,
            total.bytes_before + row.bytes_before,
            total.bytes_after + row.bytes_after,
        )
    return {name: found[name] for name in FORMATS if name in found}


def render(rows: Sequence[Row]) -> Iterator[str]:
    """The table and its totals, a line at a time; experts folded."""
    folded = fold_experts(rows)
    cells = [("layer", "kind", "module", "shape", "format", "bytes before", "bytes after")]
    for row in folded:
        layer = "-" if row.layer is None else str(row.layer)
        module = row.module + (" (tied to the embedding)" if row.is_tied else "")
        shape = " x ".join(map(str, (row.num, *row.shape) if row.num > 1 else row.shape))
        cells.append((layer, row.kind, module, shape, row.format, f"{row.bytes_before:,}", f"{row.bytes_after:,}"))
    yield from _aligned(cells, right=(0, 5, 6))
    yield ""
    cells = [("linears", "number", "weights", "bytes before", "bytes after")]
    for name, total in totals(rows).items():
        cells.append((name, *(f"{number:,}" for number in vars(total).values())))
    yield from _aligned(cells, right=(1, 2, 3, 4))


def _aligned(cells: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
