"""Compare the decoded weights of an export with those of the model that training began from; called by ``validate``.

Tensors are compared one at a time, under their names in the Hub, with the bounds of ``weight_comparison``. The vision
encoder and other tensors that are passed through unchanged must be equal.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from megatron_qad.checkpoint.expected_tensors import Inventory
from megatron_qad.checkpoint.hf_directory import AddIssue, Shards
from megatron_qad.checkpoint.hf_reader import HFReader
from megatron_qad.checkpoint.layouts import PackedLayout
from megatron_qad.checkpoint.stored_weights import StoredWeights
from megatron_qad.checkpoint.weight_comparison import Bounds, Comparison, row_tiles
from megatron_qad.formats.format_registry import FORMATS

Report = Callable[[str, Comparison], None]


def check_weights(
    original: HFReader,
    layout: PackedLayout,
    model: Inventory,
    shards: Shards,
    quantized: Mapping[str, str],
    movement: float | None,
    damaged: Collection[str],
    issue: AddIssue,
    report: Report = lambda name, comparison: None,
) -> None:
    """Report tensors whose distance from the original neither rounding nor training explains.

    Args:
        original: the model that training began from, with the Hub's tensor names.
        quantized: format of each quantized linear.
        movement: largest distance by which training can have moved a weight; None if it is not recorded.
        damaged: names of tensors that already have an issue, which are left out.
        report: called with every comparison, for measurements.
    """
    usable = {name for name, stored in shards.tensors.items() if stored.file in shards.readable and name not in damaged}
    with StoredWeights(shards, layout) as stored:
        for name in [*model.tensors, *(f"{module}.weight" for module in model.linears)]:
            module = name.removesuffix(".weight")
            fmt = quantized.get(module) if module in model.linears else None
            parts = [f"{module}.{part}" for part, _ in layout.parts(fmt).values()] if fmt else [name]
            if not usable.issuperset(parts):
                continue  # already reported, or a tied head, which is compared with the embedding
            source = model.embedding if module == model.head and model.tied_head else name
            if source not in original.names:
                issue(name, f"is not in {original.directory}, the model that training began from")
                continue
            expected = original.read(source)
            shape = model.linears[module] if fmt else shards.tensors[name].shape
            if tuple(expected.shape) != tuple(shape):
                issue(name, f"has shape {list(shape)}, but {list(expected.shape)} in {original.directory}")
                continue
            decode = stored.linear(module, fmt).decode if fmt else _rows_of(stored.read(name))
            number_format = FORMATS[fmt].weight if fmt else None
            comparison = _compare(decode, expected, 1 if number_format is None else number_format.block_size)
            report(name, comparison)
            if problem := Bounds.of(number_format, movement).problem(comparison, expected.dim() > 1):
                issue(name, f"{problem}, compared with {original.directory}")
        _check_passthrough(original, model, shards, stored, usable, issue)


def _compare(decode: Callable[[slice], Tensor], expected: Tensor, block_size: int) -> Comparison:
    comparison = Comparison(block_size)
    matrix = expected.reshape(len(expected), -1) if expected.dim() > 1 else expected.reshape(1, -1)
    for rows in row_tiles(*matrix.shape) if expected.dim() > 1 else [slice(None)]:
        tile = matrix[rows]
        comparison.add(decode(rows).reshape(tile.shape), tile)
    return comparison


def _rows_of(tensor: Tensor) -> Callable[[slice], Tensor]:
    return lambda rows: tensor[rows]


def _check_passthrough(
    original: HFReader, model: Inventory, shards: Shards, stored: StoredWeights, usable: set[str], issue: AddIssue
) -> None:
    names = {name for name in original.names if model.is_passthrough(name)}
    for name in sorted(names | {name for name in usable if model.is_passthrough(name)}):
        if name not in shards.tensors:
            issue(name, f"is missing; {original.directory} has it, and it is passed through unchanged")
        elif name not in names:
            issue(name, f"is not in {original.directory}, the model that training began from")
        elif name in usable and not _same(stored.read(name), original.read(name)):
            issue(name, f"differs from {original.directory}; expected the same values, it is passed through unchanged")


def _same(tensor: Tensor, expected: Tensor) -> bool:
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, expected)))
