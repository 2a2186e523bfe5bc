"""Packed rows: documents of a sample kept apart, each starting at a multiple of a fixed number of tokens.

Context parallelism cuts every document into ``2 * size`` equal chunks, so that each must be a multiple of that. A
document is filled up with padding that counts nowhere; what no longer fits at the end of the row is left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def separate_documents(sample: dict[str, Tensor], lengths: Sequence[int], multiple: int) -> dict[str, Tensor]:
    """A sample whose documents start at multiples of ``multiple`` and whose positions start anew in each.

    Args:
        sample: ``tokens``, ``labels`` int64 [s], ``loss_mask`` float32 [s]; s is a multiple of ``multiple``.
        lengths: of the documents in it, in order; together at most s, the rest is padding. The last may be 0: of a
            document that starts right behind the row, so that the one before it has ended.

    Returns:
        ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` [s], and ``cu_seqlens`` int32 [s + 1]: 0, the end of
        each document with its padding, and s from then on. The label of a document's last token, which is the first
        token of the next one, does not count.
    """
    size = sample["tokens"].numel()
    made = {name: torch.zeros_like(sample[name]) for name in ("tokens", "labels", "loss_mask")}
    position_ids, ends = torch.zeros(size, dtype=torch.int64), []
    source = target = 0
    for i, length in enumerate(lengths):
        taken = min(length, size - target)
        if taken == 0:
            break
        for name, whole in made.items():
            whole[target : target + taken] = sample[name][source : source + taken]
        if taken == length and i + 1 < len(lengths):
            made["loss_mask"][target + taken - 1] = 0.0
        end = target + -(-taken // multiple) * multiple
        position_ids[target:end] = torch.arange(end - target)
        ends.append(end)
        source, target = source + length, end
    if target < size:  # a short last sample: its padding is a document of its own, in which nothing counts
        position_ids[target:] = torch.arange(size - target)
        ends.append(size)
    cu_seqlens = torch.full((size + 1,), size, dtype=torch.int32)
    cu_seqlens[: len(ends) + 1] = torch.tensor([0, *ends], dtype=torch.int32)
    return made | {"position_ids": position_ids, "cu_seqlens": cu_seqlens}
