"""Packed rows: the documents of a sample are separated, each starting at a multiple of a fixed number of tokens.

Context parallelism cuts every document into ``2 * size`` equal chunks, so its length must be a multiple of that. Each
document is padded to such a length; padding never counts in the loss. Tokens that no longer fit into the row are
dropped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def separate_documents(sample: dict[str, Tensor], lengths: Sequence[int], multiple: int) -> dict[str, Tensor]:
    """Return a sample whose documents start at multiples of ``multiple``, with positions that restart in each document.

    Args:
        sample: ``tokens``, ``labels`` int64 [s], ``loss_mask`` float32 [s], and in a job with images ``feature_index``
            int64 [s], in which padding is -1; s is a multiple of ``multiple``.
        lengths: lengths of its documents, in order; their sum is at most s, the rest is padding. The last length may be
            0, for a document that starts directly after the row: the document before it is then complete.

    Returns:
        The given tensors, ``position_ids`` int64 [s], and ``cu_seqlens`` int32 [s + 1]: 0, the end of each document
        with its padding, then s. The label of a document's last token, which is the first token of the next document,
        does not count.
    """
    size = sample["tokens"].numel()
    packed = {name: torch.zeros_like(sample[name]) for name in ("tokens", "labels", "loss_mask")}
    if "feature_index" in sample:
        packed["feature_index"] = torch.full_like(sample["feature_index"], -1)
    position_ids, ends = torch.zeros(size, dtype=torch.int64), []
    source = target = 0
    for i, length in enumerate(lengths):
        taken = min(length, size - target)
        if taken == 0:
            break
        for name, row in packed.items():
            row[target : target + taken] = sample[name][source : source + taken]
        if taken == length and i + 1 < len(lengths):
            packed["loss_mask"][target + taken - 1] = 0.0
        end = target + -(-taken // multiple) * multiple
        position_ids[target:end] = torch.arange(end - target)
        ends.append(end)
        source, target = source + length, end
    if target < size:  # a short last sample: its padding becomes a separate document that never counts
        position_ids[target:] = torch.arange(size - target)
        ends.append(size)
    cu_seqlens = torch.full((size + 1,), size, dtype=torch.int32)
    cu_seqlens[: len(ends) + 1] = torch.tensor([0, *ends], dtype=torch.int32)
    return packed | {"position_ids": position_ids, "cu_seqlens": cu_seqlens}
