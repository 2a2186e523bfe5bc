"""FP8 E4M3: quantize, decode, fake-quantize and exact packing, with one float32 scale a tensor or one a row.

    value = float32(code) * scale,    scale = amax / 448

Codes are those of modelopt 0.47's exporter (``FP8QTensor``, float32 arithmetic): the quotient by the scale, to the
nearest even, saturating at 448. modelopt's training kernel multiplies by a rounded reciprocal instead and so differs
by ties and by last bits; here training calls what export calls. Left out: E5M2 and blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.common import (
    E4M3_MAX,
    FLOATS,
    MAX_ULPS,
    NotRepresentableError,
    neighbours,
    refuse_nonfinite,
    round_to_e4m3_,
    tensor_amax,
    tile_slices,
)

SCALE_MIN = 2.0**-126  # smallest normal float32: the reciprocal stays finite
# Above this, 448 * scale can overflow float32; amax is within an ulp of float32's maximum only in a broken tensor.
SCALE_MAX = torch.finfo(torch.float32).max * (1 - 2.0**-22) / E4M3_MAX


def row_amax(x: Tensor) -> Tensor:
    """Largest magnitude of every row of [..., K], float32 [..., 1]; NaN where a row has one; 0 where K is 0."""
    if x.shape[-1] == 0:
        return torch.zeros(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    low, high = x.detach().aminmax(dim=-1, keepdim=True)
    return torch.maximum(-low, high).float()


def scale_from_amax(amax: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """Amax of any shape, [] for a tensor or [rows, 1] -> float32 scale ``amax / 448`` of that shape.

    Finite and positive always: amax 0 gives 1.0, and a quotient below the smallest normal float32 is raised to it.
    Raises QADError, with ``name``, for a NaN, infinite or negative amax. The check waits for the device;
    ``check=False`` leaves it out.
    """
    amax = amax.detach().float()
    usable = torch.isfinite(amax) & (amax >= 0)
    if check and not bool(usable.all()):
        raise QADError(
            f"{name}: {int((~usable).sum())} of {amax.numel()} amaxes are NaN, infinite or negative (the first is "
            f"{amax[~usable].reshape(-1)[0].item()}), expected finite numbers >= 0. "
            "A weight or activation of it holds NaN or Inf; look for the first layer that does."
        )
    # A tensor divisor: torch on CUDA turns division by a Python number into a product with its reciprocal, an ulp off.
    scale = (amax / torch.full_like(amax, E4M3_MAX)).clamp_(min=SCALE_MIN, max=SCALE_MAX)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """FP8 of ``x``: the nearest E4M3 number to ``x / scale``, ties to even, saturating at 448.

    Args:
        x: float32, bfloat16 or float16 [..., K]; the arithmetic is float32.
        scale: float32, [] or one a row, [..., 1]; positive.
        name: of the tensor, for errors.
        check: raise QADError on NaN, Inf and an unusable scale; costs a device synchronisation per tile.

    Returns:
        float8_e4m3fn [..., K]. -0.0, and a negative number that rounds to zero, keep their sign (0x80), as in modelopt.
    """
    rows, scales = _prepare(x, scale, name, check)
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=x.device)
    for part in tile_slices(rows):
        if check and not bool(torch.isfinite(tensor_amax(rows[part]))):
            refuse_nonfinite(rows[part], name, "FP8")
        scaled = rows[part].float() / _of_rows(scales, part)
        codes[part] = scaled.clamp_(-E4M3_MAX, E4M3_MAX)  # the cast alone would make NaN of 465
    return codes.view(x.shape)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """float8_e4m3fn [..., K] and a scale as for ``quantize`` -> ``dtype`` [..., K]; float32 arithmetic, one rounding.

    Both zeros decode to +0.0. Raises QADError for codes of another dtype and a scale of another shape.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise QADError(f"FP8 codes are {codes.dtype}; expected torch.float8_e4m3fn.")
    rows = codes.reshape(-1, codes.shape[-1]) if codes.dim() else codes.reshape(1, 1)
    scales = _scale_of(rows, scale, "FP8 codes")
    out = torch.empty(rows.shape, dtype=dtype, device=codes.device)
    for part in tile_slices(rows):
        # -0.0 + 0.0 is +0.0, after the rounding: a short type can round a negative value to zero
        out[part].copy_(rows[part].float().mul_(_of_rows(scales, part))).add_(0.0)
    return out.view(codes.shape)


def fake_quant(x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """``dequantize(quantize(x))`` in ``x``'s dtype and shape. Arguments and errors as for ``quantize``.

    No gradient flows: the straight-through estimator is the caller's.
    """
    out = x.detach().clone(memory_format=torch.contiguous_format)
    return fake_quant_(out, scale, name=name, check=check)


@torch.no_grad()
def fake_quant_(x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """``fake_quant`` written over ``x``, tile by tile; returns ``x``.

    A NaN or Inf found part-way leaves the rows before it quantized.
    """
    if not x.is_contiguous():
        return x.copy_(fake_quant(x, scale, name=name, check=check))
    rows, scales = _prepare(x, scale, name, check)
    tiles = tile_slices(rows)
    size = (tiles[0].stop, rows.shape[1]) if tiles else (0, 0)
    work = torch.empty(size, dtype=torch.float32, device=x.device)
    scratch = torch.empty(size, dtype=torch.int32, device=x.device)
    for part in tiles:
        tile, tile_scale = rows[part], _of_rows(scales, part)
        if check and not bool(torch.isfinite(tensor_amax(tile))):
            refuse_nonfinite(tile, name, "FP8")
        scaled = work[: len(tile)].copy_(tile).div_(tile_scale)
        round_to_e4m3_(scaled, scratch[: len(tile)])
        tile.copy_(scaled.mul_(tile_scale)).add_(0.0)  # see dequantize
    return x


def pack_representable(weight: Tensor, scale: Tensor, *, name: str = "tensor") -> Tensor:
    """Codes of a fake-quantized tensor that decode to exactly it: ``dequantize(codes, scale, weight.dtype) == weight``.

    Quantizing again suffices: fake quantization moves a value by at most half an ulp of its type, and E4M3 steps are
    wider than that; it is verified all the same.

    Args:
        weight: float32, bfloat16 or float16 [..., K], the result of ``fake_quant`` with this ``scale``.
        scale: as for ``quantize``; the original one, or from ``recover_scale``.

    Raises NotRepresentableError, a QADError, with the count, if a value is no E4M3 number times the scale.
    """
    codes = exact_codes(weight, scale, name=name)
    if codes is None:
        wrong = int((fake_quant(weight, scale, name=name) != weight).sum())
        raise NotRepresentableError(
            f"{name}: {wrong} of {weight.numel()} values are no FP8 values under its scale. Expected a tensor that was "
            "fake-quantized with exactly this scale; was it changed since, or does it share another's scale?"
        )
    return codes


def exact_codes(weight: Tensor, scale: Tensor, *, name: str = "tensor") -> Tensor | None:
    """What ``pack_representable`` returns; None where it would raise NotRepresentableError, found at the first tile
    that is off the grid. NaN and Inf still raise QADError."""
    rows, scales = _prepare(weight, scale, name, check=True)
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for part in tile_slices(rows):
        tile_scale = _of_rows(scales, part)
        codes[part] = quantize(rows[part], tile_scale, name=name)
        if bool((dequantize(codes[part], tile_scale, weight.dtype) != rows[part]).any()):
            rest = slice(part.stop, None)
            if not bool(torch.isfinite(tensor_amax(rows[rest]))):
                quantize(rows[rest], _of_rows(scales, rest), name=name)  # raises: NaN and Inf are the worse problem
            return None
    return codes.view(weight.shape)


def is_representable(weight: Tensor, scale: Tensor, *, name: str = "tensor") -> bool:
    """Whether ``pack_representable`` would succeed. NaN and Inf still raise QADError."""
    return exact_codes(weight, scale, name=name) is not None


def recover_scale(weights: Tensor | Sequence[Tensor], *, name: str = "tensor", per_row: bool = False) -> Tensor:
    """The float32 scale under which fake-quantized weights pack exactly.

    Args:
        weights: one tensor, or (not ``per_row``) all tensors that share one scale.
        name: of the tensor or group, for errors.
        per_row: one scale a row [..., 1] instead of one [].

    For bfloat16 and float16 it is ``scale_from_amax`` of the amax, which fake quantization keeps; for float32 its
    neighbours are tried too. Raises NotRepresentableError if none packs every value.
    """
    tensors = [weights] if isinstance(weights, Tensor) else list(weights)
    if not tensors or (per_row and len(tensors) != 1):
        raise QADError(f"{name}: a scale was asked for {len(tensors)} tensors; pass the weights that share it.")
    if per_row:
        amax = row_amax(tensors[0])
    else:
        amax = torch.stack([tensor_amax(weight).cpu() for weight in tensors]).amax()
    scale = scale_from_amax(amax, name=name)
    if all(weight.dtype != torch.float32 for weight in tensors):
        return scale
    solved = torch.zeros(scale.shape, dtype=torch.bool, device=scale.device)
    for candidate in neighbours(scale):
        exact = [_exact_rows(weight, candidate, name, per_row) for weight in tensors]
        exact = exact[0] if per_row else torch.stack([row.cpu() for row in exact]).all()
        scale = torch.where(exact & ~solved, candidate, scale)
        solved |= exact
        if bool(solved.all()):
            return scale
    raise NotRepresentableError(
        f"{name}: no scale within {MAX_ULPS} ulps of {scale.reshape(-1)[0].item()} (or of its row) packs it exactly. "
        "The weights are not fake-quantized FP8 values: quantize them in place before packing, or export them with "
        "`quantize`."
    )


def _exact_rows(weight: Tensor, scale: Tensor, name: str, per_row: bool) -> Tensor:
    """bool [..., 1], or [] unless ``per_row``: where quantizing again changes nothing."""
    same = fake_quant(weight, scale, name=name) == weight
    return same.all(dim=-1, keepdim=True) if per_row else same.all()


def _prepare(x: Tensor, scale: Tensor, name: str, check: bool) -> tuple[Tensor, Tensor]:
    """Validate and return ``x`` as rows [M, K] and the scale as float32 [] or [M, 1] on x's device."""
    if x.dtype not in FLOATS:
        raise QADError(f"{name}: dtype is {x.dtype}; FP8 quantizes float32, bfloat16 and float16.")
    rows = x.detach().reshape(-1, x.shape[-1]) if x.dim() and x.shape[-1] else x.detach().reshape(-1, 1)
    scales = _scale_of(rows, scale, name)
    if check and not bool(((scales >= SCALE_MIN) & torch.isfinite(scales)).all()):
        raise QADError(
            f"{name}: its scale holds {scales.amin().item()} to {scales.amax().item()}, expected finite numbers "
            f">= {SCALE_MIN}. Compute it with scale_from_amax from the amax of the tensor."
        )
    return rows, scales


def _scale_of(rows: Tensor, scale: Tensor, name: str) -> Tensor:
    scale = scale.detach().float().to(rows.device)
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.numel() != rows.shape[0] or scale.shape[-1] != 1:
        raise QADError(
            f"{name}: its scale has shape {list(scale.shape)}; expected [] or one a row, [..., 1] with "
            f"{rows.shape[0]} elements."
        )
    return scale.reshape(-1, 1)


def _of_rows(scales: Tensor, part: slice) -> Tensor:
    return scales[part] if scales.dim() else scales
