"""Rules that choose the E4M3 scale of an NVFP4 block.

A rule uses only the block, the tensor's global scale and the amax from which that was computed. A tensor-parallel shard
therefore gets the same block scales as the whole tensor.

- ``max``: maps the block's amax to 6. Serving kernels do this for activations, and modelopt does it for weights.
- ``four_over_six``: maps the amax to 6 or 4, whichever has the smaller error (Cook et al., "Four Over Six", 2025), as
  modelopt 0.47 does. The widest gap of E2M1 is between 4 and 6, so a block with values near 5/6 of its amax gains from
  a maximum of 4. The tensor's amax has the block scale 256 instead of 448 (or 384 if it maps to 4), so that every block
  can choose.
- ``four_over_six_448``: the same with the block scale 448, where blocks with more than 0.69 of the amax map to 6.
- ``mse``: the E4M3 scale with the smallest error among those from 2 codes below the ``max`` rule's scale to 8 codes
  above it (the amax maps to about 7.5 down to 3). These include the candidate of ``four_over_six_448``.
- ``mse_multipliers``: modelopt's ``mse``: the block's amax times 39 values from 0.25 to 4.
- ``mse_sweep``: modelopt's ``mse`` with ``fp8_scale_sweep``: all 126 positive E4M3 numbers.
- ``local_hessian``: the same candidates, with the error weighted by the second moments of the layer's inputs.

The rules of modelopt are in ``searched_scales``. The error of ``four_over_six_448`` and ``mse`` is the sum of squares
over the 16 values, in float32, in units of the global scale, and ties go to the ``max`` rule's scale. All errors are
added in a fixed order, so that a kernel chooses the same scale.

Which rules preserve the amax (``ScaleRule.preserves_amax``), so that ``NumberFormat.pack`` can recompute the global scale
from a fake-quantized weight:

- ``max``, ``four_over_six_448``, ``mse``: the block that holds the amax has the scale 448 and keeps it. Its largest
  value becomes 6 * (448 * global_scale), which is the amax in 16-bit dtypes, and within an ulp of it in float32.
- ``four_over_six``: it becomes 6 * (256 * global_scale) or 4 * (384 * global_scale), exactly the amax in every dtype: 1536
  and 384 are sums of two powers of two, and for such n a quotient times n gives the dividend back,
  ``(amax / n) * n == amax`` in IEEE arithmetic (Kahan). No other block decodes to more.
- The other rules may choose any scale for the block with the amax, also one that clips it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import searched_scales
from megatron_qad.formats.common import E4M3_MAX, E4M3_MIN, round_to_e4m3_
from megatron_qad.formats.e2m1 import E2M1_MAX, round_to_e2m1_


@dataclass(frozen=True)
class ScaleRule:
    """Properties of a rule."""

    top_scale: float = E4M3_MAX
    """Block scale that maps the tensor's amax to 6."""
    preserves_amax: bool = True
    """Whether fake quantization preserves the amax of a tensor. If not, its amax must be stored with it."""
    is_searched: bool = False
    """Whether the rule is one of ``searched_scales``."""

    @property
    def divisor(self) -> float:
        """The global scale is the amax divided by this."""
        return E2M1_MAX * self.top_scale


SCALE_RULES: dict[str, ScaleRule] = {
    "max": ScaleRule(),
    "four_over_six": ScaleRule(top_scale=256.0, is_searched=True),
    "four_over_six_448": ScaleRule(),
    "mse": ScaleRule(),
    "mse_multipliers": ScaleRule(preserves_amax=False, is_searched=True),
    "mse_sweep": ScaleRule(preserves_amax=False, is_searched=True),
    "local_hessian": ScaleRule(preserves_amax=False, is_searched=True),
}
"""Rules by name, in the order of messages."""

KERNEL_RULES = ("max", "four_over_six_448", "mse")
"""Rules that the Triton kernels implement. PyTorch computes the others, on every device."""

_TOP_CODE = 0x7E  # 448
# The largest number that rounds to 448. In fake-quantized blocks amax / 4 can exceed 448 by the dtype's rounding error.
_TOP_QUOTIENT = 464.0
MSE_OFFSETS = (0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -2)  # in codes, from the max rule's scale; ties go to the earlier


def scale_rule(rule: str, name: str = "tensor") -> ScaleRule:
    """Return the rule's properties. Raises QADError, with ``name``, for an unknown rule."""
    if rule not in SCALE_RULES:
        raise QADError(f"{name}: unknown NVFP4 scale rule {rule!r}. Choose one of {', '.join(SCALE_RULES)}.")
    return SCALE_RULES[rule]


def amax_of(global_scale: Tensor, rule: str, dtype: torch.dtype) -> Tensor:
    """Return the amax, float32 [], from which a global scale was computed.

    It is exact for ``four_over_six``, and for weights of a 16-bit ``dtype``, whose amax is a number of that dtype. For
    float32 weights under another rule it can be an ulp off; pass the amax itself where modelopt's bits matter.
    """
    amax = global_scale * torch.full_like(global_scale, SCALE_RULES[rule].divisor)
    rounded = amax.to(dtype).float()
    # A scale from elsewhere, such as one shared with a float32 weight, is not within an ulp of a 16-bit amax.
    return torch.where((rounded - amax).abs() <= 2.0**-23 * amax, rounded, amax)


def choose(
    blocks: Tensor,
    block_amax: Tensor,
    global_scale: Tensor,
    rule: str,
    amax: Tensor | None = None,
    hessian: Tensor | None = None,
) -> Tensor:
    """Return the block scales of finite blocks under one rule.

    Args:
        blocks: float32 [B, 16].
        block_amax: float32 [B, 1], their largest magnitudes.
        global_scale: float32 [].
        rule: one of SCALE_RULES.
        amax: float32 [], the amax of ``global_scale``; used by the rules that search as modelopt does. None: the result
            of ``amax_of`` for float32.
        hessian: float32 [n, 16, 16] for "local_hessian", see ``searched_scales.search``.

    Returns:
        E4M3 numbers from 2^-9 to 448 as float32 [B, 1].
    """
    if SCALE_RULES[rule].is_searched:
        amax = amax_of(global_scale, rule, torch.float32) if amax is None else amax
        return searched_scales.search(blocks, block_amax, amax, SCALE_RULES[rule].top_scale, rule, hessian)
    scale = max_scale(block_amax, global_scale)
    if rule == "max":
        return scale
    if rule == "four_over_six_448":
        return _four_over_six_448(blocks, block_amax, scale, global_scale)
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


def _four_over_six_448(blocks: Tensor, block_amax: Tensor, six: Tensor, global_scale: Tensor) -> Tensor:
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
