"""The NVFP4 arithmetic: quantize, decode, fake-quantize. Training, calibration, export and validation all call this.

NVFP4 stores a tensor as E2M1 codes in blocks of 16 along the last axis, one E4M3 scale a block and one float32 scale a
tensor:

    value = e2m1[code] * (float32(block_scale) * global_scale)

The order of the float32 operations is modelopt 0.47's (``NVFP4QTensor``), so that codes and scales are equal to its,
bit for bit. This is the plain torch reference: any device, worked in tiles so that no large temporary exists. What is
left out: exact packing of weights that are fake-quantized already (``nvfp4_pack``), kernels, and the sharing of a
global scale among fused tensors or tensor-parallel shards (the caller reduces the amax and passes one scale).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_qad.runtime.errors import QADError

BLOCK_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest positive E4M3 number, a subnormal
GLOBAL_SCALE_DIVISOR = E2M1_MAX * E4M3_MAX  # 2688
GLOBAL_SCALE_MIN = (
    2.0**-126
)  # smallest normal float32: block_scale * global_scale stays above 0 and 1/global_scale finite
# Above this, 6 * (448 * global_scale) can overflow float32. amax is within an ulp of float32's maximum only in a
# broken tensor.
GLOBAL_SCALE_MAX = torch.finfo(torch.float32).max * (1 - 2.0**-22) / GLOBAL_SCALE_DIVISOR

# Code 8 is minus zero. It decodes to plus zero, as in modelopt, so that decoding and packing again is the identity.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILE_ELEMENTS = 1 << 19  # 2 MiB of float32: stays in cache, and is large enough that call overhead does not count


def tensor_amax(x: Tensor) -> Tensor:
    """Largest magnitude of ``x`` (any shape and float dtype) as float32 []; NaN if ``x`` has a NaN; 0 for an empty
    tensor."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())  # no |x| temporary
    return torch.maximum(-low, high).float()


def global_scale_from_amax(amax: Tensor, *, name: str = "tensor") -> Tensor:
    """float32 [] amax -> float32 [] global scale, ``amax / 2688`` (6, the largest code, times 448, the largest block
    scale).

    Two rules make the result finite and positive always: an all-zero tensor (amax 0) gets 1.0, and a quotient below the
    smallest normal float32 is raised to it. Raises QADError, with ``name``, for a NaN, infinite or negative amax.
    """
    amax = amax.detach().float().reshape(())
    if not bool(torch.isfinite(amax) & (amax >= 0)):
        raise QADError(
            f"{name}: amax is {amax.item()}, expected a finite number >= 0. "
            "A weight or activation of it holds NaN or Inf; look for the first layer that does."
        )
    # A tensor divisor: torch on CUDA turns division by a Python number into a product with its reciprocal, an ulp off.
    scale = amax / torch.full_like(amax, GLOBAL_SCALE_DIVISOR)
    scale = scale.clamp(min=GLOBAL_SCALE_MIN, max=GLOBAL_SCALE_MAX)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(x: Tensor, global_scale: Tensor, *, name: str = "tensor", check: bool = True) -> tuple[Tensor, Tensor]:
    """NVFP4 of ``x``: codes to the nearest, ties to the even code, saturating at 6; block scales to the nearest E4M3.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 16; the arithmetic is float32.
        global_scale: float32 [] or [1], positive.
        name: of the tensor, for errors.
        check: raise QADError on NaN, Inf and an unusable global scale; costs a device synchronisation per tile.

    Returns:
        packed uint8 [..., K/2], the even column in the low nibble, and block_scale float8_e4m3fn [..., K/16].
    """
    rows, scale = _prepare(x, global_scale, name, check)
    num_rows, dim = rows.shape
    packed = torch.empty(num_rows, dim // 2, dtype=torch.uint8, device=x.device)
    block_scale = torch.empty(num_rows, dim // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=x.device)
    for part in row_tiles(rows):
        blocks = rows[part].float().reshape(-1, BLOCK_SIZE)
        block_scale_part = _block_scale(blocks, scale, name if check else None)
        scaled = blocks / _decode_scale(block_scale_part, scale)
        packed[part] = pack_codes(encode(scaled)).view(-1, dim // 2)
        block_scale[part] = block_scale_part.view(-1, dim // BLOCK_SIZE)
    return packed.view(*x.shape[:-1], dim // 2), block_scale.view(*x.shape[:-1], dim // BLOCK_SIZE)


def dequantize(packed: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [..., K/2], float8_e4m3fn [..., K/16] and float32 [] -> ``dtype`` [..., K].

    The arithmetic is float32 with one rounding to ``dtype`` at the end. Raises QADError for other dtypes and shapes.
    """
    if packed.dtype != torch.uint8 or block_scale.dtype != torch.float8_e4m3fn:
        raise QADError(
            f"NVFP4 codes are {packed.dtype} and block scales {block_scale.dtype}; "
            "expected torch.uint8 and torch.float8_e4m3fn."
        )
    dim = packed.shape[-1] * 2
    if block_scale.shape != (*packed.shape[:-1], dim // BLOCK_SIZE):
        raise QADError(
            f"NVFP4 codes of shape {list(packed.shape)} need block scales of shape "
            f"{[*packed.shape[:-1], dim // BLOCK_SIZE]}, found {list(block_scale.shape)}."
        )
    scale = global_scale.float().reshape(()).to(packed.device)
    codes, scales = packed.reshape(-1, dim // 2), block_scale.reshape(-1, dim // BLOCK_SIZE)
    out = torch.empty(codes.shape[0], dim, dtype=dtype, device=packed.device)
    for part in row_tiles(out):
        values = decode_codes(unpack_codes(codes[part])).view(-1, BLOCK_SIZE)
        out[part] = (values * _decode_scale(scales[part].reshape(-1, 1), scale)).view(-1, dim)
        out[part].add_(0.0)  # -0.0 + 0.0 is +0.0: a negative value that a short type rounds to zero has no sign either
    return out.view(*packed.shape[:-1], dim)


def fake_quant(x: Tensor, global_scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """``dequantize(*quantize(x))`` in ``x``'s dtype and shape, without the codes; bfloat16 is rounded once, at the end.

    Serves weights [N, K] and activations of any leading shape [..., K]. Arguments and errors as for ``quantize``.
    No gradient flows: the straight-through estimator is the caller's.
    """
    out = x.detach().clone(memory_format=torch.contiguous_format)
    return fake_quant_(out, global_scale, name=name, check=check)


@torch.no_grad()
def fake_quant_(x: Tensor, global_scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
    """``fake_quant`` written over ``x``, tile by tile; returns ``x``.

    A NaN or Inf found part-way leaves the rows before it quantized.
    """
    if not x.is_contiguous():
        return x.copy_(fake_quant(x, global_scale, name=name, check=check))
    rows, scale = _prepare(x, global_scale, name, check)
    for part in row_tiles(rows):
        tile = rows[part]
        blocks = tile.float().view(-1, BLOCK_SIZE)
        decode_scale = _decode_scale(_block_scale(blocks, scale, name if check else None), scale)
        rounded = _round_to_e2m1(blocks / decode_scale)
        tile.copy_(rounded.mul_(decode_scale).view_as(tile)).add_(0.0)  # see dequantize
    return x


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 [..., K] -> uint8 [..., K/2], the even column in the low nibble."""
    return codes[..., 1::2] << 4 | codes[..., 0::2]


def unpack_codes(packed: Tensor) -> Tensor:
    """Inverse of ``pack_codes``: uint8 [..., K/2] -> uint8 [..., K]."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def decode_codes(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 -> their E2M1 values, float32, same shape; both zeros are +0.0."""
    return torch.tensor(E2M1_VALUES, device=codes.device)[codes.int()]


def _prepare(x: Tensor, global_scale: Tensor, name: str, check: bool) -> tuple[Tensor, Tensor]:
    """Validate and return ``x`` as rows [M, K] and the scale as float32 [] on x's device."""
    if x.dtype not in _FLOATS:
        raise QADError(f"{name}: dtype is {x.dtype}; NVFP4 quantizes float32, bfloat16 and float16.")
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK_SIZE:
        raise QADError(
            f"{name}: shape is {list(x.shape)}; NVFP4 needs a last dimension that is a positive "
            f"multiple of {BLOCK_SIZE}. With tensor parallelism that holds for each shard; choose a smaller parallel "
            "size or exclude the layer."
        )
    scale = global_scale.detach().float().reshape(()).to(x.device)
    if check and not GLOBAL_SCALE_MIN <= scale.item() < float("inf"):
        raise QADError(
            f"{name}: global scale is {scale.item()}, expected a finite number >= {GLOBAL_SCALE_MIN}. "
            "Compute it with global_scale_from_amax from the amax of the tensor."
        )
    return x.detach().reshape(-1, x.shape[-1]), scale


def row_tiles(rows: Tensor) -> Iterator[slice]:
    step = max(1, _TILE_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def _block_scale(blocks: Tensor, global_scale: Tensor, name: str | None) -> Tensor:
    """float32 [B, 16] -> float8_e4m3fn [B, 1]. ``name`` None leaves out the check for NaN and Inf."""
    block_amax = blocks.abs().amax(dim=-1, keepdim=True)  # NaN where a block has one
    if name is not None and not bool(torch.isfinite(block_amax).all()):
        bad = int((~torch.isfinite(blocks)).sum())
        raise QADError(
            f"{name}: {bad} of {blocks.numel()} values looked at are NaN or Inf; NVFP4 has neither. "
            "The tensor was damaged before quantization: check the checkpoint or the step that wrote it."
        )
    scale = block_amax / (global_scale * E2M1_MAX)
    scale.masked_fill_(scale == 0, 1.0)  # an all-zero block stores 1.0; others never underflow to 0 but stop at 2^-9
    return scale.clamp_(min=E4M3_MIN, max=E4M3_MAX).to(torch.float8_e4m3fn)


def _decode_scale(block_scale: Tensor, global_scale: Tensor) -> Tensor:
    return block_scale.float() * global_scale


def _round_to_e2m1(scaled: Tensor) -> Tensor:
    """Round float32 to E2M1 values, in place.

    The grid's step is 0.5 below 2, 1 below 4 and 2 up to 6; a tie to the even multiple of the step, which is what
    torch.round does, is a tie to the even code.
    """
    scaled.clamp_(-E2M1_MAX, E2M1_MAX)
    magnitude = scaled.abs()
    inverse_step = 2.0 - (magnitude >= 2.0).float() - (magnitude >= 4.0).float().mul_(0.5)
    return scaled.mul_(inverse_step).round_().div_(inverse_step)


def encode(scaled: Tensor) -> Tensor:
    """float32 values already divided by their scale -> uint8 codes 0..15, same shape. Writes over ``scaled``.

    A negative number that rounds to zero keeps its sign (code 8); -0.0 is code 0.
    """
    sign = (scaled < 0).to(torch.uint8) << 3
    doubled = _round_to_e2m1(scaled).abs_().mul_(2.0).to(torch.uint8)  # 0 1 2 3 4 6 8 12
    code = torch.minimum(doubled, (doubled >> 1) + 2)  # 0 1 2 3 4 5 6 8
    return torch.minimum(code, (doubled >> 2) + 4) | sign  # 0 1 2 3 4 5 6 7
