"""FP8 E4M3 arithmetic: quantize, dequantize, fake-quantize and exact packing. One float32 scale per tensor or row.

    value = float32(code) * scale,    scale = amax / 448

Codes equal those of modelopt 0.47's exporter (``FP8QTensor``, float32 arithmetic): the value divided by the scale is
rounded to the nearest even code and saturates at 448. modelopt's training kernel multiplies by a rounded reciprocal
instead, so its results differ in ties and last bits. Here training and export share one implementation. Not supported:
E5M2 and block scales.
"""

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.common import (
    E4M3_MAX,
    FLOAT_DTYPES,
    NotRepresentableError,
    check_finite,
    round_to_e4m3_,
    tensor_amax,
    tile_slices,
)

SCALE_MIN = 2.0**-126  # smallest normal float32, so that the reciprocal stays finite
# Above this, 448 * scale can overflow float32. Only damaged tensors have an amax within an ulp of float32's maximum.
SCALE_MAX = torch.finfo(torch.float32).max * (1 - 2.0**-22) / E4M3_MAX


def row_amax(x: Tensor) -> Tensor:
    """Return the largest magnitude of each row of [..., K] as float32 [..., 1]; NaN for rows with NaN, 0 if K is 0."""
    if x.shape[-1] == 0:
        return torch.zeros(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    low, high = x.detach().aminmax(dim=-1, keepdim=True)
    return torch.maximum(-low, high).float()


def scale_from_amax(amax: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """Return the float32 scale ``amax / 448`` in the shape of ``amax``: [] for a tensor, [rows, 1] for rows.

    The result is always finite and positive: amax 0 gives 1.0, and a quotient below the smallest normal float32 is
    raised to it. Raises QADError, with ``name``, for a NaN, infinite or negative amax. ``check=False`` skips it: the
    check synchronizes with the device.
    """
    amax = amax.detach().float()
    usable = torch.isfinite(amax) & (amax >= 0)
    if check and not bool(usable.all()):
        raise QADError(
            f"{name}: {int((~usable).sum())} of {amax.numel()} amaxes are NaN, infinite or negative (the first is "
            f"{amax[~usable].reshape(-1)[0].item()}), expected finite numbers >= 0. "
            "The weight or activation contains NaN or Inf. Look for the first layer with such values."
        )
    # The divisor is a tensor: for a Python number, PyTorch on CUDA multiplies by the reciprocal, which is an ulp off.
    scale = (amax / torch.full_like(amax, E4M3_MAX)).clamp_(min=SCALE_MIN, max=SCALE_MAX)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """Quantize ``x`` to FP8: the E4M3 number nearest to ``x / scale``. Ties go to even; values saturate at 448.

    Args:
        x: float32, bfloat16 or float16 [..., K]; the arithmetic is float32.
        scale: float32 [], or [..., 1] with one scale per row; positive.
        name: name of the tensor for errors.
        check: raise QADError for NaN, Inf or an invalid scale. Costs one device synchronization per tile.

    Returns:
        float8_e4m3fn [..., K]. -0.0 and negative numbers that round to zero keep their sign (0x80), as in modelopt.
    """
    rows, scales = _prepare(x, scale, name, check)
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=x.device)
    for part in tile_slices(rows):
        if check and not bool(torch.isfinite(tensor_amax(rows[part]))):
            check_finite(rows[part], name, "FP8")
        scaled = rows[part].float() / _row_scales(scales, part)
        codes[part] = scaled.clamp_(-E4M3_MAX, E4M3_MAX)  # without the clamp the cast turns 465 into NaN
    return codes.view(x.shape)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode float8_e4m3fn codes [..., K] to ``dtype`` [..., K], in float32 arithmetic with one rounding.

    ``scale`` has the shape that ``quantize`` accepts. Both zeros decode to +0.0. Raises QADError for codes of another
    dtype or a scale of another shape.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise QADError(f"FP8 codes have dtype {codes.dtype}, expected float8_e4m3fn. Pass the result of quantize.")
    rows = codes.reshape(-1, codes.shape[-1]) if codes.dim() else codes.reshape(1, 1)
    scales = _reshape_scale(rows, scale, "FP8 codes")
    out = torch.empty(rows.shape, dtype=dtype, device=codes.device)
    for part in tile_slices(rows):
        # -0.0 + 0.0 is +0.0. This follows the rounding because a 16-bit dtype can round a negative value to zero.
        out[part].copy_(rows[part].float().mul_(_row_scales(scales, part))).add_(0.0)
    return out.view(codes.shape)


def fake_quant(x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """Fake-quantize ``x``: the result of ``dequantize(quantize(x))`` in ``x``'s dtype and shape.

    Arguments and errors are those of ``quantize``. The result has no gradient; the caller implements the
    straight-through estimator.

    Example:
        >>> scale = scale_from_amax(torch.tensor(896.0))
        >>> fake_quant(torch.tensor([1.0, 33.0, 100.0, 896.0, 1000.0]), scale)
        tensor([  1.,  32.,  96., 896., 896.])
    """
    out = x.detach().clone(memory_format=torch.contiguous_format)
    return fake_quant_(out, scale, name=name, check=check)


@torch.no_grad()
def fake_quant_(x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """In-place version of ``fake_quant``, tile by tile. Returns ``x``.

    If it raises for NaN or Inf, the tiles before the bad one are already quantized.
    """
    if not x.is_contiguous():
        return x.copy_(fake_quant(x, scale, name=name, check=check))
    rows, scales = _prepare(x, scale, name, check)
    tiles = tile_slices(rows)
    size = (tiles[0].stop, rows.shape[1]) if tiles else (0, 0)
    work = torch.empty(size, dtype=torch.float32, device=x.device)
    scratch = torch.empty(size, dtype=torch.int32, device=x.device)
    for part in tiles:
        tile, tile_scale = rows[part], _row_scales(scales, part)
        if check and not bool(torch.isfinite(tensor_amax(tile))):
            check_finite(tile, name, "FP8")
        scaled = work[: len(tile)].copy_(tile).div_(tile_scale)
        round_to_e4m3_(scaled, scratch[: len(tile)])
        tile.copy_(scaled.mul_(tile_scale)).add_(0.0)  # see dequantize
    return x


def pack_representable(weight: Tensor, scale: Tensor, *, name: str = "tensor") -> Tensor:
    """Pack a fake-quantized tensor exactly: ``dequantize(codes, scale, weight.dtype)`` equals it.

    Quantizing again is enough: rounding to the tensor's dtype changes a value by at most half an ulp, and E4M3 steps
    are wider than that. The result is verified anyway.

    Args:
        weight: float32, bfloat16 or float16 [..., K], the result of ``fake_quant`` with this ``scale``.
        scale: the original scale, or the scale that ``NumberFormat.pack`` finds; shapes as for ``quantize``.
        name: name of the tensor for errors.

    Raises NotRepresentableError, a QADError, with the number of values that FP8 cannot represent under this scale.
    """
    codes = exact_codes(weight, scale, name=name)
    if codes is None:
        num_wrong = int((fake_quant(weight, scale, name=name) != weight).sum())
        raise NotRepresentableError(
            f"{name}: {num_wrong} of {weight.numel()} values are not representable in FP8 under its scale. Expected a "
            "tensor fake-quantized with exactly this scale. Check whether it was changed since, or whether it shares "
            "another tensor's scale."
        )
    return codes


def exact_codes(weight: Tensor, scale: Tensor, *, name: str = "tensor") -> Tensor | None:
    """Return the codes that decode to exactly ``weight``, or None if FP8 cannot represent it under ``scale``.

    Stops at the first tile that is not representable. Raises QADError for NaN and Inf.
    """
    rows, scales = _prepare(weight, scale, name, check=True)
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for part in tile_slices(rows):
        tile_scale = _row_scales(scales, part)
        codes[part] = quantize(rows[part], tile_scale, name=name)
        if bool((dequantize(codes[part], tile_scale, weight.dtype) != rows[part]).any()):
            remaining = slice(part.stop, None)
            if not bool(torch.isfinite(tensor_amax(rows[remaining]))):
                # Raises, because NaN and Inf are the worse problem.
                quantize(rows[remaining], _row_scales(scales, remaining), name=name)
            return None
    return codes.view(weight.shape)


def is_representable(weight: Tensor, scale: Tensor, *, name: str = "tensor") -> bool:
    """Whether ``pack_representable`` would succeed. Raises QADError for NaN and Inf."""
    return exact_codes(weight, scale, name=name) is not None


def _prepare(x: Tensor, scale: Tensor, name: str, check: bool) -> tuple[Tensor, Tensor]:
    """Validate the arguments; return ``x`` as rows [M, K] and the scale as float32 [] or [M, 1] on ``x``'s device."""
    if x.dtype not in FLOAT_DTYPES:
        raise QADError(f"{name}: dtype is {x.dtype}, expected float32, bfloat16 or float16 for FP8. Cast it first.")
    rows = x.detach().reshape(-1, x.shape[-1]) if x.dim() and x.shape[-1] else x.detach().reshape(-1, 1)
    scales = _reshape_scale(rows, scale, name)
    if check and not bool(((scales >= SCALE_MIN) & torch.isfinite(scales)).all()):
        raise QADError(
            f"{name}: the scale ranges from {scales.amin().item()} to {scales.amax().item()}, expected finite numbers "
            f">= {SCALE_MIN}. Compute it with scale_from_amax from the amax of the tensor."
        )
    return rows, scales


def _reshape_scale(rows: Tensor, scale: Tensor, name: str) -> Tensor:
    scale = scale.detach().float().to(rows.device)
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() != rows.shape[0] or scale.shape[-1] != 1:
        raise QADError(
            f"{name}: the scale has shape {list(scale.shape)}, expected [] or [..., 1] with {rows.shape[0]} elements. "
            "Pass one scale per tensor or per row."
        )
    return scale.reshape(-1, 1)


def _row_scales(scales: Tensor, part: slice) -> Tensor:
    return scales[part] if scales.dim() else scales
