"""INT4 arithmetic for weights: symmetric codes -8..7 with one BF16 scale per group of 128 elements of a row.

    scale = bf16(amax of the group / 7)        at least 2^-126, so that a group of zeros has a positive scale
    code  = clamp(round_half_even(x / scale), -8, 7)
    value = code * scale, rounded once to the dtype of the weight

The scale is rounded to BF16 before any division, because servers hold scales in BF16: what is trained is what they
multiply with. modelopt's fake quantizer keeps the scale in float32; where amax / 7 is a BF16 number, both agree bit for
bit (``tests/unit/formats/test_int4.py``). Packed codes are compressed-tensors' format pack-quantized.
"""

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.common import check_finite

GROUP_SIZE = 128
MIN_CODE, MAX_CODE = -8, 7
SCALE_MIN = 2.0**-126  # the smallest normal BF16 number
_CODES_PER_INT32 = 8


def quantize(x: Tensor, *, name: str = "tensor", check: bool = True) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` [..., K] to INT4 codes and group scales.

    Args:
        x: float tensor; K is a multiple of 128.
        name: of the tensor, for errors.
        check: look for NaN and Inf.

    Returns:
        codes int8 [..., K] in -8..7, and scales bfloat16 [..., K / 128].

    Raises:
        QADError: K is not a multiple of 128, or ``x`` holds NaN or Inf.

    Example:
        >>> codes, scales = quantize(torch.arange(-64.0, 64.0))
        >>> codes[[0, 64, 127]].tolist(), scales.tolist()
        ([-7, 0, 7], [9.125])
    """
    groups = _groups(x, name)
    scales = _scales(groups)
    if check and not bool(torch.isfinite(scales).all()):
        check_finite(x, name, "INT4")
    return _codes(groups, scales).reshape(x.shape), scales.bfloat16()


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values [..., K] of int8 codes [..., K] and bfloat16 scales [..., K / 128]."""
    groups = codes.float().unflatten(-1, (-1, GROUP_SIZE))
    return (groups * scales.float().unsqueeze(-1)).to(dtype).flatten(-2)


def exact_codes(weight: Tensor, *, name: str = "tensor") -> tuple[Tensor, Tensor] | None:
    """Return codes and scales that decode to exactly ``weight`` [..., K]; None if a group has none.

    The amax of a fake-quantized group is 7 scales, rounded to the weight's dtype. A seventh of it can round to a BF16
    neighbour of the scale, so each group tries three scales.

    Raises:
        QADError: as ``quantize``.
    """
    groups = _groups(weight, name)
    first = _scales(groups)
    if not bool(torch.isfinite(first).all()):
        check_finite(weight, name, "INT4")
    codes = torch.zeros(groups.shape, dtype=torch.int8, device=weight.device)
    scales, is_missing = first.clone(), torch.ones_like(first, dtype=torch.bool)
    for offset in (0, -1, 1):
        candidate = (first.bfloat16().view(torch.int16) + offset).view(torch.bfloat16).float().clamp_(min=SCALE_MIN)
        tried = _codes(groups, candidate)
        decoded = (tried.float() * candidate.unsqueeze(-1)).to(weight.dtype)
        fits = (decoded == groups).all(-1) & is_missing
        codes[fits], scales[fits] = tried[fits], candidate[fits]
        is_missing &= ~fits
        if not bool(is_missing.any()):
            return codes.reshape(weight.shape), scales.bfloat16()
    return None


def pack_codes(codes: Tensor) -> Tensor:
    """Pack int8 codes [..., K] into int32 [..., K / 8]: the first code in the lowest four bits, each plus 8."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int64, device=codes.device)
    words = ((codes.to(torch.int64) + 8).unflatten(-1, (-1, _CODES_PER_INT32)) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack int32 [..., K / 8] into int8 codes [..., K]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    return (((packed.unsqueeze(-1) >> shifts) & 0xF).to(torch.int8) - 8).flatten(-2)


def _groups(x: Tensor, name: str) -> Tensor:
    if not x.shape or x.shape[-1] % GROUP_SIZE:
        raise QADError(
            f"{name}: shape {list(x.shape)}; INT4 needs a last dimension that is a multiple of {GROUP_SIZE}. Choose a "
            "smaller tensor-parallel size, or another format for this layer."
        )
    return x.detach().unflatten(-1, (-1, GROUP_SIZE))


def _scales(groups: Tensor) -> Tensor:
    """float32 [..., K / 128] that hold BF16 numbers; NaN or Inf where the group has one."""
    return (groups.float().abs().amax(-1) / MAX_CODE).bfloat16().float().clamp_(min=SCALE_MIN)


def _codes(groups: Tensor, scales: Tensor) -> Tensor:
    return torch.round(groups.float() / scales.unsqueeze(-1)).clamp_(MIN_CODE, MAX_CODE).to(torch.int8)
