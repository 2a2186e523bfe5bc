"""The NVFP4 arithmetic: quantize, decode, fake-quantize. Training, calibration, export and validation all call this.

NVFP4 stores a tensor as E2M1 codes in blocks of 16 along the last axis, one E4M3 scale a block and one float32 scale a
tensor:

    value = e2m1[code] * (float32(block_scale) * global_scale)

The order of the float32 operations is modelopt 0.47's (``NVFP4QTensor``), so that codes and scales are equal to its,
bit for bit. This is the plain torch reference: any device, worked in tiles so that no large temporary exists. Fake
quantization on a GPU goes to ``nvfp4_triton``, whose bits are the same. What is left out: exact packing of weights that
are fake-quantized already (``nvfp4_pack``), and the sharing of a global scale among fused tensors or tensor-parallel
shards (the caller reduces the amax and passes one scale).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import block_scales
from megatron_qad.formats.block_scales import SCALE_RULES
from megatron_qad.formats.common import (
    E4M3_MAX,
    E4M3_MIN,
    FLOATS,
    amax_bits,
    refuse_bad_blocks,
    refuse_nonfinite,
    tensor_amax,
    tile_slices,
    triton_serves,
)
from megatron_qad.formats.e2m1 import (
    E2M1_MAX,
    E2M1_VALUES,
    decode_codes,
    encode,
    pack_codes,
    round_to_e2m1_,
    unpack_codes,
)

__all__ = [
    "BLOCK_SIZE",
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "E4M3_MIN",
    "GLOBAL_SCALE_MAX",
    "GLOBAL_SCALE_MIN",
    "SCALE_RULES",
    "decode_codes",
    "dequantize",
    "encode",
    "fake_quant",
    "fake_quant_",
    "global_scale_from_amax",
    "pack_codes",
    "quantize",
    "tensor_amax",
    "unpack_codes",
]

BLOCK_SIZE = 16
GLOBAL_SCALE_DIVISOR = E2M1_MAX * E4M3_MAX  # 2688
# The smallest normal float32: block_scale * global_scale stays above 0 and 1/global_scale finite.
GLOBAL_SCALE_MIN = 2.0**-126
# Above this, 6 * (448 * global_scale) can overflow float32. amax is within an ulp of float32's maximum only in a
# broken tensor.
GLOBAL_SCALE_MAX = torch.finfo(torch.float32).max * (1 - 2.0**-22) / GLOBAL_SCALE_DIVISOR


def global_scale_from_amax(amax: Tensor, *, name: str | Sequence[str] = "tensor", check: bool = True) -> Tensor:
    """float32 amax -> float32 global scale of the same shape ([] or [1] to []), ``amax / 2688``: 6, the largest code,
    times 448, the largest block scale.

    Two rules make the result finite and positive always: an all-zero tensor (amax 0) gets 1.0, and a quotient below the
    smallest normal float32 is raised to it. Raises QADError for a NaN, infinite or negative amax, with ``name``; for
    amaxes [n] of n tensors ``name`` holds n names. The check waits for the device; ``check=False`` leaves it out.
    """
    amax = amax.detach().float()
    amax = amax.reshape(()) if isinstance(name, str) else amax
    usable = torch.isfinite(amax) & (amax >= 0)
    if check and not bool(usable.all()):
        names = [name] if isinstance(name, str) else name
        bad = (~usable.reshape(-1)).nonzero().flatten().tolist()
        raise QADError(
            "; ".join(f"{names[i]}: amax is {amax.reshape(-1)[i].item()}" for i in bad[:8])
            + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
            + ", expected a finite number >= 0. "
            "A weight or activation of it holds NaN or Inf; look for the first layer that does."
        )
    # A tensor divisor: torch on CUDA turns division by a Python number into a product with its reciprocal, an ulp off.
    scale = amax / torch.full_like(amax, GLOBAL_SCALE_DIVISOR)
    scale = scale.clamp(min=GLOBAL_SCALE_MIN, max=GLOBAL_SCALE_MAX)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(
    x: Tensor, global_scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
) -> tuple[Tensor, Tensor]:
    """NVFP4 of ``x``: codes to the nearest, ties to the even code, saturating at 6; block scales to the nearest E4M3.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 16; the arithmetic is float32.
        global_scale: float32 [] or [1], positive.
        name: of the tensor, for errors.
        check: raise QADError on NaN, Inf and an unusable global scale; costs a device synchronisation per tile.
        rule: how a block's scale is chosen, one of SCALE_RULES (``block_scales``). Activations need "max", which is
            what serving kernels do.

    Returns:
        packed uint8 [..., K/2], the even column in the low nibble, and block_scale float8_e4m3fn [..., K/16].
    """
    rows, scale = _prepare(x, global_scale, name, check, rule)
    num_rows, dim = rows.shape
    packed = torch.empty(num_rows, dim // 2, dtype=torch.uint8, device=x.device)
    block_scale = torch.empty(num_rows, dim // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=x.device)
    for part in tile_slices(rows):
        blocks = rows[part].float().reshape(-1, BLOCK_SIZE)
        block_scale_part = _block_scale(blocks, scale, name if check else None, rule)
        scaled = blocks / (block_scale_part * scale)
        packed[part] = pack_codes(encode(scaled)).view(-1, dim // 2)
        block_scale[part] = block_scale_part.view(-1, dim // BLOCK_SIZE)  # the cast is exact
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
    for part in tile_slices(out):
        values = decode_codes(unpack_codes(codes[part])).view(-1, BLOCK_SIZE)
        out[part] = (values * (scales[part].reshape(-1, 1).float() * scale)).view(-1, dim)
        out[part].add_(0.0)  # -0.0 + 0.0 is +0.0: a negative value that a short type rounds to zero has no sign either
    return out.view(*packed.shape[:-1], dim)


def fake_quant(
    x: Tensor, global_scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
) -> Tensor:
    """``dequantize(*quantize(x))`` in ``x``'s dtype and shape, without the codes; bfloat16 is rounded once, at the end.

    Serves weights [N, K] and activations of any leading shape [..., K]. Arguments and errors as for ``quantize``.
    No gradient flows: the straight-through estimator is the caller's.
    """
    out = x.detach().clone(memory_format=torch.contiguous_format)
    return fake_quant_(out, global_scale, name=name, check=check, rule=rule)


@torch.no_grad()
def fake_quant_(
    x: Tensor, global_scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
) -> Tensor:
    """``fake_quant`` written over ``x``, tile by tile, or by a kernel where one serves; returns ``x``.

    When NaN or Inf is found, part of the rest is quantized already.
    """
    if not x.is_contiguous():
        return x.copy_(fake_quant(x, global_scale, name=name, check=check, rule=rule))
    rows, scale = _prepare(x, global_scale, name, check, rule)
    if triton_serves(x):
        from megatron_qad.formats import nvfp4_triton

        bad = nvfp4_triton.fake_quant_(x.detach(), scale, rule)
        if check:
            refuse_bad_blocks(bad, [name])
        return x
    all_blocks = rows.view(-1, BLOCK_SIZE)
    tiles = tile_slices(all_blocks)
    size = (tiles[0].stop, BLOCK_SIZE) if tiles else (0, BLOCK_SIZE)
    work = torch.empty(size, dtype=torch.float32, device=x.device)
    scratch = torch.empty(size, dtype=torch.int32, device=x.device)
    for part in tiles:
        tile = all_blocks[part]
        scaled, bits = work[: len(tile)], scratch[: len(tile)]
        blocks = tile if tile.dtype == torch.float32 else scaled.copy_(tile)
        decode_scale = _block_scale(blocks, scale, name if check else None, rule, bits).mul_(scale)
        round_to_e2m1_(torch.div(blocks, decode_scale, out=scaled), bits)
        if tile.dtype == torch.float32:
            torch.mul(scaled, decode_scale, out=tile)
        else:
            tile.copy_(scaled.mul_(decode_scale)).add_(0.0)  # see dequantize
    return x


def require_blocks(x: Tensor, name: str, rule: str) -> None:
    """Raise QADError, with ``name``, unless ``x`` has a dtype and shape that NVFP4 quantizes and ``rule`` exists."""
    if x.dtype not in FLOATS:
        raise QADError(f"{name}: dtype is {x.dtype}; NVFP4 quantizes float32, bfloat16 and float16.")
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK_SIZE:
        raise QADError(
            f"{name}: shape is {list(x.shape)}; NVFP4 needs a last dimension that is a positive "
            f"multiple of {BLOCK_SIZE}. With tensor parallelism that holds for each shard; choose a smaller parallel "
            "size or exclude the layer."
        )
    if rule not in SCALE_RULES:
        raise QADError(f"{name}: NVFP4 scale rule {rule!r} is unknown; choose one of {', '.join(SCALE_RULES)}.")


def require_scale(scale: Tensor, name: str) -> None:
    """Raise QADError, with ``name``, unless the global scale, float32 [], is usable. Synchronises."""
    if not GLOBAL_SCALE_MIN <= scale.item() < float("inf"):
        raise QADError(
            f"{name}: global scale is {scale.item()}, expected a finite number >= {GLOBAL_SCALE_MIN}. "
            "Compute it with global_scale_from_amax from the amax of the tensor."
        )


def _prepare(x: Tensor, global_scale: Tensor, name: str, check: bool, rule: str) -> tuple[Tensor, Tensor]:
    """Validate and return ``x`` as rows [M, K] and the scale as float32 [] on x's device."""
    require_blocks(x, name, rule)
    scale = global_scale.detach().float().reshape(()).to(x.device)
    if check:
        require_scale(scale, name)
    return x.detach().reshape(-1, x.shape[-1]), scale


def _block_scale(
    blocks: Tensor, global_scale: Tensor, name: str | None, rule: str, scratch: Tensor | None = None
) -> Tensor:
    """float32 [B, 16] -> E4M3 numbers as float32 [B, 1]. ``name`` None leaves out the check for NaN and Inf."""
    block_amax = amax_bits(blocks, -1, scratch)  # NaN where a block has one
    if name is not None and not bool(torch.isfinite(block_amax).all()):
        refuse_nonfinite(blocks, name, "NVFP4")
    return block_scales.choose(blocks, block_amax, global_scale, rule)
