"""Penalty on NVFP4 blocks whose scale has grown since the start of training.

A block's scale is its amax divided by 6, and the quantization step is proportional to the scale, so one growing weight
makes the other 15 coarser. The penalty is the sum over blocks of max(0, amax / initial amax - 1)^2, where both amaxes
are those of quantized weights. Like weight decay it is a sum, so the force on a weight does not depend on the model
size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.formats.nvfp4 import BLOCK_SIZE


@dataclass(frozen=True)
class ScaleGrowth:
    """The term ``scale_growth`` of ``--qad-loss``. It covers NVFP4 weights only and skips blocks that were zero."""

    needs_teacher = False


def block_amaxes(weight: Tensor) -> Tensor:
    """Return the largest magnitude of each block of ``weight`` [..., n]: [..., n / 16], in the weight's dtype."""
    return weight.unflatten(-1, (-1, BLOCK_SIZE)).abs().amax(dim=-1)


def scale_growth(weight: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Return the penalty of one weight (or shard) and its gradient.

    Args:
        weight: quantized NVFP4 weight [..., n].
        initial: ``block_amaxes`` of the weight before training, [..., n / 16].

    Returns:
        The penalty, float32 [], and its gradient, float32 [..., n]. The gradient of a block goes to its largest element
        and is split equally between ties.
    """
    blocks = weight.detach().float().unflatten(-1, (-1, BLOCK_SIZE))
    start = initial.float()
    magnitudes = blocks.abs()
    amaxes = magnitudes.amax(dim=-1)
    counts = start > 0
    growth = torch.where(counts, amaxes / torch.where(counts, start, 1.0) - 1, 0.0).clamp(min=0)
    largest = magnitudes == amaxes[..., None]
    pull = torch.where(counts, 2 * growth / torch.where(counts, start, 1.0), 0.0) / largest.sum(dim=-1)
    return growth.square().sum(), (blocks.sign() * largest * pull[..., None]).flatten(-2)
