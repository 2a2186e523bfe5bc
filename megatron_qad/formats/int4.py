"""INT4 arithmetic for weights: symmetric codes -7..7 with one BF16 scale per group of 128 elements of a row.

    scale = bf16(amax of the group / 7)        from 2^-126, so that a group of zeros has a positive scale, to 2^125
    code  = clamp(round_half_even(x / scale), -7, 7)        amax / scale never rounds to 8
    value = code * scale, rounded once to the dtype of the weight

The scale is rounded to BF16 before any division. transformers and vLLM hold scales in the dtype of the model and would
round float32 ones on loading. compressed-tensors multiplies in this dtype: for a BF16 model its product is the value
above, bit for bit.

modelopt 0.47's fake quantizer does not round the scale. Where amax / 7 is a BF16 number, both agree bit for bit.
Elsewhere rounding moves the scale by at most 2^-8 of itself and changes 0.3 % of the codes of normally distributed
weights, each by 1; the mean squared error stays the same to within 0.1 %. Stored with BF16 scales, 6 % of modelopt's
values would change after training, by up to two units in the last place. Packed codes are compressed-tensors' format
pack-quantized. The figures are checked in ``tests/unit/formats/test_int4.py``.
"""

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import e2m1
from megatron_qad.formats.common import check_finite, tile_slices

GROUP_SIZE = 128
MAX_CODE = 7
SCALE_MIN = 2.0**-126  # the smallest normal BF16 number
SCALE_MAX = 2.0**125  # 7 * SCALE_MAX is finite in BF16
_OFFSET = 8  # a stored code is 0 to 15


def quantize(x: Tensor, *, name: str = "tensor", check: bool = True) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` [..., K] to INT4 codes and group scales.

    Args:
        x: float tensor; K is a multiple of 128.
        name: of the tensor, for errors.
        check: look for NaN and Inf.

    Returns:
        codes int8 [..., K] in -7..7, and scales bfloat16 [..., K / 128].

    Raises:
        QADError: K is not a multiple of 128, or ``x`` holds NaN or Inf.

    Example:
        >>> codes, scales = quantize(torch.arange(-64.0, 64.0))
        >>> codes[[0, 64, 127]].tolist(), scales.tolist()
        ([-7, 0, 7], [9.125])
    """
    groups = _groups(x, name)
    scales = _scales(groups, x, name, check)
    return _codes(groups, scales).reshape(x.shape), scales.bfloat16()


@torch.no_grad()
def fake_quant_(x: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """Replace ``x`` [..., K] by ``dequantize(*quantize(x))``, in tiles that bound the temporaries; return ``x``.

    Raises:
        QADError: as ``quantize``; the groups of earlier tiles are quantized by then.
    """
    if not x.is_contiguous():
        return x.copy_(fake_quant_(x.contiguous(), name=name, check=check))
    groups = _groups(x, name).view(-1, GROUP_SIZE)
    for part in tile_slices(groups):
        tile = groups[part].float()
        scales = _scales(tile, x, name, check).unsqueeze(-1)
        codes = (tile / scales).round_().clamp_(-MAX_CODE, MAX_CODE)
        groups[part] = codes.mul_(scales).add_(0.0)  # -0.0 becomes 0.0, as in dequantize
    return x


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values [..., K] of int8 codes [..., K] and bfloat16 scales [..., K / 128]."""
    groups = codes.float().unflatten(-1, (-1, GROUP_SIZE))
    return (groups * scales.float().unsqueeze(-1)).to(dtype).flatten(-2)


def exact_codes(weight: Tensor, *, name: str = "tensor") -> tuple[Tensor, Tensor] | None:
    """Return codes and scales that decode to exactly ``weight`` [..., K]; None if a group has none.

    The amax of a fake-quantized group is 7 scales, rounded to the weight's dtype. For 14 of the 128 BF16 mantissas a
    seventh of it rounds to a neighbour of the scale, so ``fake_quant_`` is not idempotent there and each group tries
    three scales.

    Raises:
        QADError: as ``quantize``.
    """
    groups = _groups(weight, name).reshape(-1, GROUP_SIZE)
    codes = torch.empty(groups.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(groups), dtype=torch.bfloat16, device=weight.device)
    for part in tile_slices(groups):
        if not _find_codes(groups[part], _scales(groups[part], weight, name), codes[part], scales[part]):
            return None
    return codes.reshape(weight.shape), scales.reshape(*weight.shape[:-1], -1)


def _find_codes(groups: Tensor, first: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """Write the exact codes and scales of a tile [groups, 128], near the scales ``first``; False if a group has
    none."""
    missing = torch.ones_like(first, dtype=torch.bool)
    for offset in (0, -1, 1):
        candidate = (first.bfloat16().view(torch.int16) + offset).view(torch.bfloat16).float().clamp_(min=SCALE_MIN)
        tried = _codes(groups, candidate)
        decoded = (tried.float() * candidate.unsqueeze(-1)).to(groups.dtype)
        fits = (decoded == groups).all(-1) & missing
        codes[fits], scales[fits] = tried[fits], candidate[fits].bfloat16()
        missing &= ~fits
        if not bool(missing.any()):
            return True
    return False


def pack_codes(codes: Tensor) -> Tensor:
    """Pack int8 codes [..., K] into int32 [..., K / 8]: the first code in the lowest four bits, each plus 8."""
    return e2m1.pack_codes((codes + _OFFSET).to(torch.uint8)).view(torch.int32)


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack int32 [..., K / 8] into int8 codes [..., K]."""
    return e2m1.unpack_codes(packed.view(torch.uint8)).to(torch.int8) - _OFFSET


def _groups(x: Tensor, name: str) -> Tensor:
    if not x.shape or x.shape[-1] % GROUP_SIZE:
        raise QADError(
            f"{name}: shape {list(x.shape)}; INT4 needs a last dimension that is a multiple of {GROUP_SIZE}. Choose a "
            "smaller tensor-parallel size, or another format for this layer."
        )
    return x.detach().unflatten(-1, (-1, GROUP_SIZE))


def _scales(groups: Tensor, x: Tensor, name: str, check: bool = True) -> Tensor:
    """Return float32 [..., K / 128] that hold BF16 numbers. NaN or Inf in ``groups``, a part of ``x``, raises."""
    amax = groups.abs().amax(-1).float()
    # torch on CUDA multiplies by the reciprocal of a Python number, which can be an ulp off; a tensor is divided by.
    scales = (amax / torch.full_like(amax, MAX_CODE)).bfloat16().float().clamp_(min=SCALE_MIN)
    if check and not bool(amax.isfinite().all()):
        check_finite(x, name, "INT4")
    return torch.where(amax.isfinite(), scales.clamp_(max=SCALE_MAX), amax)


def _codes(groups: Tensor, scales: Tensor) -> Tensor:
    return torch.round(groups.float() / scales.unsqueeze(-1)).clamp_(-MAX_CODE, MAX_CODE).to(torch.int8)
