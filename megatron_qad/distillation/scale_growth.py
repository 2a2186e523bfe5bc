"""A penalty on NVFP4 blocks whose scale has grown since training began.

A block's scale is its largest magnitude over 6, and the step between its codes is in proportion to it: one weight that
grows makes the 15 beside it coarser. The penalty is the sum over blocks of max(0, amax / initial amax - 1)^2, both of
the weights on the grid. Like weight decay it is a sum, so that its pull on a weight does not depend on the model's
size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.formats.nvfp4 import BLOCK_SIZE


@dataclass(frozen=True)
class ScaleGrowth:
    """The term ``scale_growth`` of ``--qad-loss``. Of NVFP4 weights only; blocks that were zero stay out."""

    needs_teacher = False


def block_amaxes(weight: Tensor) -> Tensor:
    """[..., n] -> [..., n / 16]: the largest magnitude of each block, in the weight's dtype."""
    return weight.unflatten(-1, (-1, BLOCK_SIZE)).abs().amax(dim=-1)


def scale_growth(weight: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The penalty of one weight (or shard) and its gradient.

    Args:
        weight: [..., n], on the NVFP4 grid. initial: [..., n / 16], ``block_amaxes`` of the weight before training.

    Returns:
        float32 [] and [..., n]. A block's gradient goes to its largest elements, in equal parts where several are.
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
