"""Table of a resolved policy: the shape, format and size in bytes (before and after quantization) of every linear.

The size after quantization is that of a packed checkpoint: codes, block scales, and the float32 scales of each weight
and its input. Experts with equal rows can be folded into one row.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.quantization.rules import Linear, module_name
from megatron_qad.quantization.scale_settings import NEW_JOBS, ScaleSetting

BF16_BYTES = 2
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class ShapedLinear(Linear, Protocol):
    """A linear with the shape and the Hugging Face names of its weight. ``models.families`` provides such objects."""

    shape: tuple[int, ...]
    hf: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A table row: one linear, or ``num`` experts that differ only in their index."""

    layer: int | None
    kind: str
    module: str
    """Name of the Megatron module."""
    hf: tuple[str, ...]
    """Names of the Hugging Face modules whose weights this weight contains."""
    shape: tuple[int, ...]
    format: str
    bytes_before: int
    """Size in BF16; 0 for a tied head, which has no tensor of its own."""
    bytes_after: int
    """Size in a packed checkpoint; 0 for a tied head."""
    is_tied: bool = False
    num: int = 1
    scales: str = ""
    """How the block scales are obtained (``ScaleSetting``); empty for formats without block scales."""
    layers: tuple[int, ...] = ()
    """The layers of a row that stands for several."""


def format_rows(
    linears: Sequence[ShapedLinear], formats: dict[str, str], scales: Mapping[str, ScaleSetting] | None = None
) -> list[Row]:
    """Return one row per linear, in model order. ``formats`` is keyed by Megatron weight name (``policy.resolve``).

    Args:
        scales: from ``policy.resolve_scales``. None leaves them out of the table.

    Raises:
        QADError: the input dimension of a linear is not a multiple of its format's block size.
    """
    scales = scales or {}
    return [_row(linear, formats[linear.megatron], str(scales.get(linear.megatron, ""))) for linear in linears]


def _row(linear: ShapedLinear, name: str, scales: str) -> Row:
    fmt, (rows, columns) = FORMATS[name], linear.shape
    if columns % (block := fmt.block_size):
        raise QADError(
            f"{linear.megatron} has {columns} columns, and {name} needs a multiple of {block}. Give it another format."
        )
    before, after = BF16_BYTES * rows * columns, fmt.num_bytes(rows, columns, num_linears=len(linear.hf))
    if linear.is_tied:
        before = after = 0
    hf = tuple(tensor.removesuffix(".weight") for tensor in linear.hf)
    module = module_name(linear)
    return Row(linear.layer, linear.kind, module, hf, linear.shape, name, before, after, linear.is_tied, scales=scales)


def fold_experts(rows: Sequence[Row]) -> list[Row]:
    """Merge rows of a layer that differ only in the expert index into one: ``experts.{0..127}.linear_fc1``."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (row.layer, row.kind, _EXPERT.sub(".experts.{}.", row.module), row.shape, row.format, row.scales)
        groups.setdefault(key, []).append(row)
    return [_fold(group, key[2]) for key, group in groups.items()]


def fold_layers(rows: Sequence[Row]) -> list[Row]:
    """Merge rows that differ only in the layer, and in the expert, into one: ``decoder.layers.*.mlp.linear_fc1``."""
    groups: dict[tuple, list[Row]] = {}
    for row in fold_experts(rows):
        module = row.module if row.layer is None else row.module.replace(f".layers.{row.layer}.", ".layers.*.", 1)
        key = (row.kind, module, row.shape, row.format, row.scales, row.is_tied, row.num)
        groups.setdefault(key, []).append(row)
    return [_fold_layers(group, key[1]) for key, group in groups.items()]


def _fold_layers(group: list[Row], module: str) -> Row:
    if len(group) == 1:
        return group[0]
    return replace(
        group[0],
        module=module,
        bytes_before=sum(row.bytes_before for row in group),
        bytes_after=sum(row.bytes_after for row in group),
        num=sum(row.num for row in group),
        layers=tuple(row.layer for row in group),
    )


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


def _layers(row: Row) -> str:
    """Return the layer of a row, or those of a folded one: as ranges, or their number between the first and last."""
    if not row.layers:
        return str(row.layer)
    ranges = _ranges(list(row.layers))
    return ranges if len(ranges) <= 16 else f"{len(row.layers)} of {row.layers[0]}..{row.layers[-1]}"


def _ranges(numbers: list[int]) -> str:
    """Format integers as ranges: [0, 1, 2, 5] becomes "0..2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("..".join(map(str, part)) for part in parts)


@dataclass(frozen=True)
class Total:
    """Totals over the linears of one format."""

    num_linears: int = 0
    num_weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


def totals(rows: Sequence[Row]) -> dict[str, Total]:
    """Return the totals by format, in registry order. A tied head counts as a linear without weights."""
    by_format: dict[str, Total] = {}
    for row in rows:
        total = by_format.get(row.format, Total())
        by_format[row.format] = Total(
            total.num_linears + row.num,
            total.num_weights + row.bytes_before // BF16_BYTES,
            total.bytes_before + row.bytes_before,
            total.bytes_after + row.bytes_after,
        )
    return {name: by_format[name] for name in FORMATS if name in by_format}


def render(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table, with experts folded, and of the totals.

    The table has a column of scale settings if a setting differs from that of new jobs."""
    has_scales = any(row.scales not in ("", str(NEW_JOBS)) for row in rows)
    cells = [("layer", "kind", "module", "shape", "format", *(["scales"] * has_scales), "bytes before", "bytes after")]
    for row in fold_experts(rows):
        layer = "-" if row.layer is None else _layers(row)
        module = row.module + (" (tied to the embedding)" if row.is_tied else "")
        shape = " x ".join(map(str, (row.num, *row.shape) if row.num > 1 else row.shape))
        fmt = (row.format, row.scales) if has_scales else (row.format,)
        cells.append((layer, row.kind, module, shape, *fmt, f"{row.bytes_before:,}", f"{row.bytes_after:,}"))
    num = len(cells[0])
    yield from aligned(cells, right=(0, num - 2, num - 1))
    yield ""
    cells = [("linears", "number", "weights", "bytes before", "bytes after")]
    for name, total in totals(rows).items():
        cells.append((name, *(f"{number:,}" for number in vars(total).values())))
    yield from aligned(cells, right=(1, 2, 3, 4))


def aligned(cells: Sequence[tuple[str, ...]], right: Collection[int]) -> Iterator[str]:
    """Yield the lines of a table; the columns ``right`` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
