"""Exact packing of weights that are NVFP4 values already: what was trained is what ships, bit for bit.

A fake-quantized weight is on the grid, but quantizing it again by the ``max`` rule does not always give it back. Under
another rule its largest code need not be 6. Even under ``max``, if the block scale was one of the few subnormal E4M3
numbers, rounding it up left no code 6 in the block: scale 2 * 2^-9 with largest code 4 is measured again as
4 * 2 / 6 = 1.33 * 2^-9, which picks 1 * 2^-9 and saturates. In float32 also the tensor's amax can move by an ulp and
with it the global scale. Both are searched for here, and every result is verified by decoding it. Left out: rounding
of any kind.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.common import (
    E4M3_MAX,
    E4M3_MIN,
    MAX_ULPS,
    NotRepresentableError,
    neighbours,
    tensor_amax,
    tile_slices,
)
from megatron_qad.formats.e2m1 import decode_codes, encode, pack_codes
from megatron_qad.formats.nvfp4 import (
    BLOCK_SIZE,
    dequantize,
    global_scale_from_amax,
    quantize,
    require_blocks,
    require_scale,
)

__all__ = ["NotRepresentableError", "is_representable", "pack_representable", "recover_global_scale"]

_SEARCH_BLOCKS = 1 << 10  # blocks searched among all scales at a time: 1024 x 126 x 16 values, 8 MiB of float32
_LARGEST_CODES = (6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5)


def pack_representable(weight: Tensor, global_scale: Tensor, *, name: str = "tensor") -> tuple[Tensor, Tensor]:
    """Pack a fake-quantized tensor so that ``dequantize(packed, block_scale, global_scale, weight.dtype)`` equals it.

    Args:
        weight: float32, bfloat16 or float16 [..., K], the result of ``fake_quant`` with this ``global_scale``.
        global_scale: float32 []; from the original amax, or ``recover_global_scale``.

    Returns:
        packed uint8 [..., K/2] and block_scale float8_e4m3fn [..., K/16]. Both zeros of ``weight`` become code 0.

    Raises NotRepresentableError, a QADError, with the count, if a block of ``weight`` is no NVFP4 block under this
    global scale, at the first tile that has one: of a weight that was never quantized no more than a tile is packed.
    """
    require_blocks(weight, name, "max")
    require_scale(global_scale.float(), name)
    dim = weight.shape[-1]
    rows = weight.detach().reshape(-1, dim)
    packed = torch.empty(len(rows), dim // 2, dtype=torch.uint8, device=weight.device)
    block_scale = torch.empty(len(rows), dim // BLOCK_SIZE, dtype=torch.float8_e4m3fn, device=weight.device)
    for part in tile_slices(rows):
        packed[part], block_scale[part] = quantize(rows[part], global_scale, name=name)
        wrong = _wrong_blocks(rows[part], packed[part], block_scale[part], global_scale)
        if not bool(wrong.any()):
            continue
        blocks = rows[part].reshape(-1, BLOCK_SIZE)[wrong]
        try:
            codes, scales = _search(blocks, global_scale, name, blocks_seen=part.stop * (dim // BLOCK_SIZE))
        except NotRepresentableError:
            rest = rows[part.stop :]
            if not bool(torch.isfinite(tensor_amax(rest))):
                quantize(rest, global_scale, name=name)  # raises: NaN and Inf are the worse problem
            raise
        packed[part].view(-1, BLOCK_SIZE // 2)[wrong] = pack_codes(codes)
        # Through uint8 because torch has no indexed assignment of float8 on the CPU.
        block_scale[part].view(torch.uint8).view(-1)[wrong] = scales.view(torch.uint8)
    return packed.view(*weight.shape[:-1], dim // 2), block_scale.view(*weight.shape[:-1], dim // BLOCK_SIZE)


def is_representable(weight: Tensor, global_scale: Tensor, *, name: str = "tensor") -> bool:
    """Whether ``pack_representable`` would succeed. NaN and Inf still raise QADError."""
    try:
        pack_representable(weight, global_scale, name=name)
    except NotRepresentableError:
        return False
    return True


def recover_global_scale(weights: Tensor | Sequence[Tensor], *, name: str = "tensor") -> Tensor:
    """The float32 [] global scale under which fake-quantized weights pack exactly.

    Args:
        weights: one tensor, or all tensors that share one global scale (q, k and v; gate and up), [..., K] each.
        name: of the tensor or group, for errors.

    For bfloat16 and float16 that is ``global_scale_from_amax`` of their amax: fake quantization keeps the amax (the
    float32 error is 2^-22 of it, far below half an ulp of the short types). For float32 the neighbouring scales are
    tried too. Raises QADError if none packs every tensor.
    """
    tensors = [weights] if isinstance(weights, Tensor) else list(weights)
    if not tensors:
        raise QADError(f"{name}: a global scale was asked for no tensor at all; pass the weights that share it.")
    amax = torch.stack([tensor_amax(weight).cpu() for weight in tensors]).amax()
    scale = global_scale_from_amax(amax, name=name)
    if all(weight.dtype != torch.float32 for weight in tensors):
        return scale
    for candidate in neighbours(scale):
        if all(is_representable(weight, candidate, name=name) for weight in tensors):
            return candidate
    raise NotRepresentableError(
        f"{name}: no global scale within {MAX_ULPS} ulps of {scale.item()} packs it exactly. The weights are not "
        "fake-quantized NVFP4 values: quantize them in place before packing, or export them with `quantize`."
    )


def _wrong_blocks(rows: Tensor, packed: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """bool [B]: the blocks whose decoded values differ from ``rows`` (-0.0 counts as 0.0)."""
    decoded = dequantize(packed, block_scale, global_scale, rows.dtype)
    return (decoded != rows).reshape(-1, BLOCK_SIZE).any(dim=-1)


def _search(blocks: Tensor, global_scale: Tensor, name: str, blocks_seen: int) -> tuple[Tensor, Tensor]:
    """[B, 16] -> codes uint8 [B, 16] and scales float8_e4m3fn [B]: for each block the smallest E4M3 scale that decodes
    exactly (some such scale, if the block's amax is a subnormal number of its type).

    The largest value of an on-grid block is c * s * global_scale for a code value c, so that at most seven scales need
    trying, each the nearest E4M3 number of amax / (c * global_scale). Nearest finds s, because amax is off by less than
    E4M3 can see: the float32 products by 2^-23 (2^-13 where they are subnormal: the smallest is 0.5 * 2^-9 * 2^-126),
    the rounding to the weight's type by 2^-9 where it is a normal number of that type; half a step of E4M3 is 2^-5 of
    a normal number or more, and 1/14 of a subnormal or more. Only a block whose amax is a subnormal of its own type (an
    expert in float16 near 1e-6) may need all 126 scales.
    """
    scale = global_scale.float().reshape(()).to(blocks.device)
    amax = blocks.abs().amax(dim=-1).float()
    codes = torch.zeros(blocks.shape, dtype=torch.uint8, device=blocks.device)
    found = torch.zeros(len(blocks), dtype=torch.uint8, device=blocks.device)  # E4M3 as bytes; 0 stands for none
    left = torch.arange(len(blocks), device=blocks.device)
    for largest in _LARGEST_CODES:
        candidates = (amax[left] / (largest * scale)).clamp_(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
        tried, exact = _try(blocks[left], candidates.float() * scale)
        codes[left[exact]], found[left[exact]] = tried[exact], candidates.view(torch.uint8)[exact]
        left = left[~exact]
        if not len(left):
            return codes, found.view(torch.float8_e4m3fn)
    subnormal = amax[left] < torch.finfo(blocks.dtype).tiny
    hopeless = int((~subnormal).sum())
    if not hopeless:
        candidates = torch.arange(1, 0x7F, dtype=torch.uint8, device=blocks.device)
        decode_scales = candidates.view(torch.float8_e4m3fn).float() * scale
        for part in left.split(_SEARCH_BLOCKS):
            tried, exact = _try(blocks[part].unsqueeze(1), decode_scales)  # [B, 126, 16] and [B, 126]
            first = exact.int().argmax(dim=-1)
            codes[part], found[part] = tried[torch.arange(len(part), device=part.device), first], candidates[first]
            hopeless += int((~exact.any(dim=-1)).sum())
    if hopeless:
        raise NotRepresentableError(
            f"{name}: at least {hopeless} of the first {blocks_seen} blocks of {BLOCK_SIZE} are no NVFP4 values "
            f"under the global scale {global_scale.item()}, whatever their block scale. Expected a tensor that was "
            "fake-quantized with exactly this scale; was it changed since, or does it share another's scale?"
        )
    return codes, found.view(torch.float8_e4m3fn)


def _try(blocks: Tensor, decode_scales: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [..., 16] under the float32 scales [...]: their codes, and bool [...] whether these decode to the
    blocks."""
    decode_scales = decode_scales.unsqueeze(-1)
    codes = encode(blocks.float() / decode_scales)
    decoded = (decode_codes(codes) * decode_scales).to(blocks.dtype)
    return codes, (decoded == blocks).all(dim=-1)
