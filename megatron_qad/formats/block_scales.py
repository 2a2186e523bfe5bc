"""The E4M3 scale of an NVFP4 block, by one of three rules. All look at one block and the tensor's global scale only, so
that any tensor-parallel shard chooses what the whole tensor would.

- ``max``: the block's amax becomes 6. What serving kernels do with activations, and modelopt with weights.
- ``four_over_six``: it becomes 6 or 4, whichever errs less (Cook et al., "Four Over Six", 2025). Between 4 and 6 lies
  the widest gap of the grid, so that a block with values near 5/6 of its amax gains from ending at 4.
- ``mse``: the E4M3 scale that errs least among those from 2 codes below the ``max`` rule's to 8 codes above it
  (amax becomes about 7.5 down to 3); the candidate of ``four_over_six`` is among them.

The error is the sum of squares over the 16 values, in float32, in units of the global scale, added in one fixed order
so that a kernel can choose the same scale. Ties go to the ``max`` rule's scale.

A block whose ``max`` scale is 448, the top, keeps it under every rule. The tensor's amax lies in such a block, becomes
6 * 448 * global_scale, and so survives: the exporter recomputes the global scale from it
(``nvfp4_pack.recover_global_scale``).
"""

import torch
from torch import Tensor

from megatron_qad.formats.common import E4M3_MIN, round_to_e4m3_
from megatron_qad.formats.e2m1 import E2M1_MAX, round_to_e2m1_

SCALE_RULES = ("max", "four_over_six", "mse")

_TOP_CODE = 0x7E  # 448
# Where nearest rounding still ends at 448: an on-grid block's amax / 4 may exceed 448 by the rounding of its type.
_TOP_QUOTIENT = 464.0
MSE_OFFSETS = (0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -2)  # codes from the max rule's; an earlier one wins a tie


def choose(blocks: Tensor, block_amax: Tensor, global_scale: Tensor, rule: str) -> Tensor:
    """Block scales for finite blocks.

    Args:
        blocks: float32 [B, 16].
        block_amax: float32 [B, 1], their largest magnitudes.
        global_scale: float32 [].
        rule: one of SCALE_RULES.

    Returns E4M3 numbers 2^-9 to 448 as float32 [B, 1]; 1.0 for an all-zero block.
    """
    scale = max_scale(block_amax, global_scale)
    if rule == "max":
        return scale
    if rule == "four_over_six":
        return _four_over_six(blocks, block_amax, scale, global_scale)
    return _mse(blocks, scale, global_scale)


def max_scale(block_amax: Tensor, global_scale: Tensor) -> Tensor:
    """float32 [B, 1] -> E4M3 numbers as float32 [B, 1]: amax / 6 in units of the global scale, as modelopt computes."""
    scale = block_amax / (global_scale * E2M1_MAX)
    scale.masked_fill_(scale == 0, 1.0)  # an all-zero block stores 1.0; others never underflow to 0 but stop at 2^-9
    return round_to_e4m3_(scale.clamp_(min=E4M3_MIN))


def squared_error(blocks: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """Sum of squared errors of float32 [B, 16] under block scales, float32 [B, 1] both; in units of global_scale^2."""
    scaled = blocks / (block_scale * global_scale)
    errors = round_to_e2m1_(scaled.clone()).sub_(scaled).square_()
    while errors.shape[1] > 1:  # halves onto halves: an order of addition that every device can keep
        half = errors.shape[1] // 2
        errors = errors[:, :half] + errors[:, half:]
    return errors * (block_scale * block_scale)


def _four_over_six(blocks: Tensor, block_amax: Tensor, six: Tensor, global_scale: Tensor) -> Tensor:
    quotient = block_amax / (global_scale * 4.0)
    four = round_to_e4m3_(quotient.clamp(min=E4M3_MIN))
    better = squared_error(blocks, four, global_scale) < squared_error(blocks, six, global_scale)
    better &= quotient <= _TOP_QUOTIENT  # so the top stays, whose quotient is 1.5 * 432 at least
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
