"""NVFP4 arithmetic: quantize, dequantize and fake-quantize. Training, calibration, export and validation all use it.

NVFP4 stores a tensor as E2M1 codes in blocks of 16 along the last dimension, with one E4M3 scale per block and one
float32 scale per tensor:

    value = e2m1[code] * (float32(block_scale) * global_scale)

The float32 operations have the same order as in modelopt 0.47 (``NVFP4QTensor``), so codes and scales are equal bit for
bit. This is the plain PyTorch reference. It runs on any device, in tiles that avoid large temporary tensors. On a GPU,
fake quantization uses ``nvfp4_triton``, which gives the same bits. ``nvfp4_pack`` packs weights that are already
fake-quantized. To share a global scale among fused tensors or tensor-parallel shards, the caller reduces their amaxes
and passes one scale.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import block_scales
from megatron_qad.formats.block_scales import SCALE_RULES, scale_rule
from megatron_qad.formats.common import (
    E4M3_MAX,
    E4M3_MIN,
    FLOAT_DTYPES,
    amax_bits,
    check_blocks,
    check_finite,
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
# The smallest normal float32. It keeps block_scale * global_scale above 0 and 1 / global_scale finite.
GLOBAL_SCALE_MIN = 2.0**-126
# Above this, 6 * (448 * global_scale) can overflow float32. Only damaged tensors have an amax within an ulp of the
# float32 maximum.
GLOBAL_SCALE_MAX = torch.finfo(torch.float32).max * (1 - 2.0**-22) / (E2M1_MAX * E4M3_MAX)


def global_scale_from_amax(
    amax: Tensor, *, name: str | Sequence[str] = "tensor", check: bool = True, rule: str = "max"
) -> Tensor:
    """Return the global scale ``amax / 2688``: 6, the largest E2M1 value, times 448, the largest E4M3 block scale.

    Under the rule "four_over_six" it is ``amax / 1536``, so that a block scale can be 1.5 * 256.
    The result is always finite and positive: amax 0 (an all-zero tensor) gives 1.0, and a quotient below the smallest
    normal float32 is raised to it.

    Args:
        amax: float32 [] or [1] of one tensor, or [n] of n tensors.
        name: name of the tensor for errors; n names if ``amax`` is that of n tensors.
        check: raise QADError for a NaN, infinite or negative amax. The check synchronizes with the device.
        rule: rule that will choose the block scales, one of SCALE_RULES.

    Returns:
        float32 [], or [n] for n tensors.

    Example:
        >>> global_scale_from_amax(torch.tensor(5376.0))
        tensor(2.)
    """
    divisor = scale_rule(rule, name if isinstance(name, str) else "weights").divisor
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
            "The weight or activation contains NaN or Inf. Look for the first layer with such values."
        )
    # The divisor is a tensor: for a Python number, PyTorch on CUDA multiplies by the reciprocal, which is an ulp off.
    scale = amax / torch.full_like(amax, divisor)
    scale = scale.clamp(min=GLOBAL_SCALE_MIN, max=GLOBAL_SCALE_MAX)
    return torch.where(amax == 0, torch.ones_like(scale), scale)


def quantize(
    x: Tensor, global_scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` to NVFP4. Block scales are rounded to the nearest E4M3 number.

    Values are rounded to the nearest code, ties to the even code, and saturate at 6 times their scale.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 16; the arithmetic is float32.
        global_scale: float32 [] or [1], positive.
        name: name of the tensor for errors.
        check: raise QADError for NaN, Inf or an invalid global scale. Costs one device synchronization per tile.
        rule: rule that chooses the block scales, one of SCALE_RULES (see ``block_scales``). Use "max" for activations,
            as serving kernels do.

    Returns:
        packed uint8 [..., K/2], with the even column in the low nibble, and block_scale float8_e4m3fn [..., K/16].

    Example:
        >>> x = torch.arange(16.0)
        >>> packed, block_scale = quantize(x, global_scale_from_amax(x.amax()))
        >>> packed.shape, block_scale
        (torch.Size([8]), tensor([448.], dtype=torch.float8_e4m3fn))
    """
    rows, scale = _prepare(x, global_scale, name, check, rule)
    amax = block_scales.amax_of(scale, rule, x.dtype)
    num_rows, dim = rows.shape
    packed = torch.empty(num_rows, dim // 2, dtype=torch.uint8, device=x.device)
    block_scale = torch.empty(num_rows, dim // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=x.device)
    for part in tile_slices(rows):
        blocks = rows[part].float().reshape(-1, BLOCK_SIZE)
        block_scale_part = block_scales_of(blocks, scale, name if check else None, rule, amax)
        scaled = blocks / (block_scale_part * scale)
        packed[part] = pack_codes(encode(scaled)).view(-1, dim // 2)
        block_scale[part] = block_scale_part.view(-1, dim // BLOCK_SIZE)  # the cast is exact
    return packed.view(*x.shape[:-1], dim // 2), block_scale.view(*x.shape[:-1], dim // BLOCK_SIZE)


def dequantize(packed: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode NVFP4 codes to ``dtype`` [..., K]. The arithmetic is float32, with one rounding to ``dtype`` at the end.

    Args:
        packed: uint8 [..., K/2].
        block_scale: float8_e4m3fn [..., K/16].
        global_scale: float32 [].
        dtype: dtype of the result.

    Raises QADError for other dtypes or shapes of the inputs.

    Example:
        >>> x, scale = torch.arange(16.0), torch.tensor(0.5)
        >>> dequantize(*quantize(x, scale), scale)[:6]
        tensor([0.0000, 1.2500, 2.5000, 2.5000, 3.7500, 5.0000])
    """
    if packed.dtype != torch.uint8 or block_scale.dtype != torch.float8_e4m3fn:
        raise QADError(
            f"NVFP4 codes have dtype {packed.dtype} and block scales {block_scale.dtype}, "
            "expected torch.uint8 and torch.float8_e4m3fn. Pass the results of quantize."
        )
    dim = packed.shape[-1] * 2
    if block_scale.shape != (*packed.shape[:-1], dim // BLOCK_SIZE):
        raise QADError(
            f"NVFP4 block scales have shape {list(block_scale.shape)}, expected "
            f"{[*packed.shape[:-1], dim // BLOCK_SIZE]} for codes of shape {list(packed.shape)}. "
            "Pass codes and block scales of the same tensor."
        )
    scale = global_scale.float().reshape(()).to(packed.device)
    codes, scales = packed.reshape(-1, dim // 2), block_scale.reshape(-1, dim // BLOCK_SIZE)
    out = torch.empty(codes.shape[0], dim, dtype=dtype, device=packed.device)
    for part in tile_slices(out):
        values = decode_codes(unpack_codes(codes[part])).view(-1, BLOCK_SIZE)
        out[part] = (values * (scales[part].reshape(-1, 1).float() * scale)).view(-1, dim)
        out[part].add_(0.0)  # -0.0 + 0.0 is +0.0: negative values that a 16-bit dtype rounds to zero lose their sign
    return out.view(*packed.shape[:-1], dim)


def fake_quant(
    x: Tensor, global_scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
) -> Tensor:
    """Fake-quantize ``x``: the result of ``dequantize(*quantize(x))`` in ``x``'s dtype and shape, without the codes.

    bfloat16 is rounded once, at the end. ``x`` is a weight [N, K] or an activation [..., K]. Arguments and errors are
    those of ``quantize``. The result has no gradient; the caller implements the straight-through estimator.

    Example:
        >>> x = torch.arange(16.0)
        >>> fake_quant(x, global_scale_from_amax(x.amax()))[:6]
        tensor([0.0000, 1.2500, 2.5000, 2.5000, 3.7500, 5.0000])
    """
    out = x.detach().clone(memory_format=torch.contiguous_format)
    return fake_quant_(out, global_scale, name=name, check=check, rule=rule)


@torch.no_grad()
def fake_quant_(
    x: Tensor, global_scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
) -> Tensor:
    """In-place version of ``fake_quant``, by tiles or by a Triton kernel. Returns ``x``.

    If it raises for NaN or Inf, part of ``x`` is already quantized.
    """
    if not x.is_contiguous():
        return x.copy_(fake_quant(x, global_scale, name=name, check=check, rule=rule))
    rows, scale = _prepare(x, global_scale, name, check, rule)
    if rule in block_scales.KERNEL_RULES and triton_serves(x):
        from megatron_qad.formats import nvfp4_triton

        bad = nvfp4_triton.fake_quant_(x.detach(), scale, rule)
        if check:
            check_blocks(bad, [name])
        return x
    amax = block_scales.amax_of(scale, rule, x.dtype)
    all_blocks = rows.view(-1, BLOCK_SIZE)
    tiles = tile_slices(all_blocks)
    size = (tiles[0].stop, BLOCK_SIZE) if tiles else (0, BLOCK_SIZE)
    work = torch.empty(size, dtype=torch.float32, device=x.device)
    scratch = torch.empty(size, dtype=torch.int32, device=x.device)
    for part in tiles:
        tile = all_blocks[part]
        scaled, bits = work[: len(tile)], scratch[: len(tile)]
        blocks = tile if tile.dtype == torch.float32 else scaled.copy_(tile)
        decode_scale = block_scales_of(blocks, scale, name if check else None, rule, amax, scratch=bits).mul_(scale)
        round_to_e2m1_(torch.div(blocks, decode_scale, out=scaled), bits)
        if tile.dtype == torch.float32:
            torch.mul(scaled, decode_scale, out=tile)
        else:
            tile.copy_(scaled.mul_(decode_scale)).add_(0.0)  # see dequantize
    return x


def check_quantizable(x: Tensor, name: str, rule: str) -> None:
    """Check that ``x`` has a dtype and shape that NVFP4 supports and that ``rule`` exists. Raises QADError."""
    if x.dtype not in FLOAT_DTYPES:
        raise QADError(f"{name}: dtype is {x.dtype}, expected float32, bfloat16 or float16 for NVFP4. Cast it first.")
    if x.dim() == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK_SIZE:
        raise QADError(
            f"{name}: shape is {list(x.shape)}, but NVFP4 needs a last dimension that is a positive multiple of "
            f"{BLOCK_SIZE}. With tensor parallelism this applies to each shard. Choose a smaller parallel size or "
            "exclude the layer."
        )
    scale_rule(rule, name)


def check_global_scale(scale: Tensor, name: str) -> None:
    """Check that the global scale, float32 [], is finite and large enough. Raises QADError. Synchronizes."""
    if not GLOBAL_SCALE_MIN <= scale.item() < float("inf"):
        raise QADError(
            f"{name}: global scale is {scale.item()}, expected a finite number >= {GLOBAL_SCALE_MIN}. "
            "Compute it with global_scale_from_amax from the amax of the tensor."
        )


def _prepare(x: Tensor, global_scale: Tensor, name: str, check: bool, rule: str) -> tuple[Tensor, Tensor]:
    """Validate the arguments; return ``x`` as rows [M, K] and the scale as float32 [] on ``x``'s device."""
    check_quantizable(x, name, rule)
    if rule == "local_hessian":
        raise QADError(f"{name}: the rule local_hessian needs a Hessian. Use NumberFormat.block_scales.")
    scale = global_scale.detach().float().reshape(()).to(x.device)
    if check:
        check_global_scale(scale, name)
    return x.detach().reshape(-1, x.shape[-1]), scale


def block_scales_of(
    blocks: Tensor,
    global_scale: Tensor,
    name: str | None,
    rule: str,
    amax: Tensor,
    hessian: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Return the E4M3 scales of float32 blocks [B, 16] as float32 [B, 1].

    ``name=None`` skips the check for NaN and Inf. ``scratch``: int32 [B, 16], overwritten. The other arguments are those
    of ``block_scales.choose``.
    """
    block_amax = amax_bits(blocks, -1, scratch)  # NaN where a block has one
    if name is not None and not bool(torch.isfinite(block_amax).all()):
        check_finite(blocks, name, "NVFP4")
    return block_scales.choose(blocks, block_amax, global_scale, rule, amax, hessian)
