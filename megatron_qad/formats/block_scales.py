"""Rules that choose the E4M3 scale of an NVFP4 block.

A rule uses only the block and the tensor's global scale. A tensor-parallel shard therefore gets the same block scales
as the whole tensor.

- ``max``: maps the block's amax to 6. Serving kernels do this for activations, and modelopt does it for weights.
- ``four_over_six``: maps the amax to 6 or 4, whichever has the smaller error (Cook et al., "Four Over Six", 2025). The
  widest gap of E2M1 is between 4 and 6, so a block with values near 5/6 of its amax gains from a maximum of 4.
- ``mse``: the E4M3 scale with the smallest error among those from 2 codes below the ``max`` rule's scale to 8 codes
  above it (the amax maps to about 7.5 down to 3). These include the candidate of ``four_over_six``.

The error is the sum of squares over the 16 values, in float32, in units of the global scale. The order of addition is
fixed, so that a kernel chooses the same scale. Ties go to the ``max`` rule's scale.

A block whose ``max`` scale is 448, the largest E4M3 number, keeps it under every rule. The tensor's amax is in such a
block and becomes 6 * 448 * global_scale. This preserves the amax, from which the exporter recomputes the global scale
(``NumberFormat.pack``).
"""

import torch
from torch import Tensor

from megatron_qad.formats.common import E4M3_MIN, round_to_e4m3_
from megatron_qad.formats.e2m1 import E2M1_MAX, round_to_e2m1_

SCALE_RULES = ("max", "four_over_six", "mse")

_TOP_CODE = 0x7E  # 448
# The largest number that rounds to 448. In fake-quantized blocks amax / 4 can exceed 448 by the dtype's rounding error.
_TOP_QUOTIENT = 464.0
MSE_OFFSETS = (0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -2)  # in codes, from the max rule's scale; ties go to the earlier


def choose(blocks: Tensor, block_amax: Tensor, global_scale: Tensor, rule: str) -> Tensor:
    """Return the block scales of finite blocks under one rule.

    Args:
        blocks: float32 [B, 16].
        block_amax: float32 [B, 1], their largest magnitudes.
        global_scale: float32 [].
        rule: one of SCALE_RULES.

    Returns:
        E4M3 numbers from 2^-9 to 448 as float32 [B, 1]; 1.0 for an all-zero block.
    """
    scale = max_scale(block_amax, global_scale)
    if rule == "max":
        return scale
    if rule == "four_over_six":
        return _four_over_six(blocks, block_amax, scale, global_scale)
    return _mse(blocks, scale, global_scale)


def max_scale(block_amax: Tensor, global_scale: Tensor) -> Tensor:
    """Return amax / 6 in units of the global scale, rounded to E4M3, as float32 [B, 1]. Same arithmetic as modelopt."""
    scale = block_amax / (global_scale * E2M1_MAX)
    scale.masked_fill_(scale == 0, 1.0)  # all-zero blocks store 1.0; the clamp keeps others above 0
    return round_to_e4m3_(scale.clamp_(min=E4M3_MIN))


def squared_error(blocks: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """Return the sum of squared errors of each block, float32 [B, 1], in units of global_scale^2.

    blocks: float32 [B, 16]. block_scale: float32 [B, 1].
    """
    scaled = blocks / (block_scale * global_scale)
    errors = round_to_e2m1_(scaled.clone()).sub_(scaled).square_()
    while errors.shape[1] > 1:  # adding half to half is an order that every device can reproduce
        half = errors.shape[1] // 2
        errors = errors[:, :half] + errors[:, half:]
    return errors * (block_scale * block_scale)


def _four_over_six(blocks: Tensor, block_amax: Tensor, six: Tensor, global_scale: Tensor) -> Tensor:
    quotient = block_amax / (global_scale * 4.0)
    four = round_to_e4m3_(quotient.clamp(min=E4M3_MIN))
    better = squared_error(blocks, four, global_scale) < squared_error(blocks, six, global_scale)
    better &= quotient <= _TOP_QUOTIENT  # a max scale of 448 stays: its quotient is >= 1.5 * 432
    return torch.where(better, four, six)


def _mse(blocks: Tensor, start: Tensor, global_scale: Tensor) -> Tensor:
    values = torch.arange(128, dtype=torch.uint8, device=blocks.device).view(torch.float8_e4m3fn).float()
    codes = start.to(torch.float8_e4m3fn).view(torch.uint8).int()
    best, least = start, squared_error(blocks, start, global_scale)
    for offset in MSE_OFFSETS[1:]:
        candidate = values[(codes + offset).clamp_(1, _TOP_CODE)]
        error = squared_error(blocks, candidate, global_scale)
        better = (error < least) & (codes != _TOP_CODE)
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best
