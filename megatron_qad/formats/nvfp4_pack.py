"""Exact packing of weights that are fake-quantized to NVFP4: the exported weights equal the trained ones bit for bit.

Quantizing a fake-quantized weight again with the ``max`` rule does not always reproduce it. Under another rule, the
largest code of a block need not be 6. Even under ``max``, a block has no code 6 if its scale was rounded up to one of
the few subnormal E4M3 numbers: scale 2 * 2^-9 with largest code 4 is measured again as 4 * 2 / 6 = 1.33 * 2^-9, which
rounds to 1 * 2^-9 and saturates. In float32 the tensor's amax, and with it the global scale, can also change by an ulp.
This module searches for the block scale and the global scale and verifies every result by decoding it
(``nvfp4_exact``). It never rounds a value.
"""

import torch
from torch import Tensor

from megatron_qad.formats import block_scales
from megatron_qad.formats.common import (
    E4M3_MAX,
    E4M3_MIN,
    NotRepresentableError,
    amax_bits,
    check_finite,
    tile_slices,
)
from megatron_qad.formats.e2m1 import decode_codes, encode, pack_codes
from megatron_qad.formats.nvfp4 import BLOCK_SIZE, check_global_scale, check_quantizable
from megatron_qad.formats.nvfp4_exact import ExactEncoder

__all__ = ["NotRepresentableError", "is_representable", "pack_representable"]

_SEARCH_BLOCKS = 1 << 10  # blocks per search over all scales: 1024 x 126 x 16 values, 8 MiB of float32
_LARGEST_CODES = (6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5)


def pack_representable(weight: Tensor, global_scale: Tensor, *, name: str = "tensor") -> tuple[Tensor, Tensor]:
    """Pack a fake-quantized tensor exactly: ``dequantize(packed, block_scale, global_scale, weight.dtype)`` equals it.

    Args:
        weight: float32, bfloat16 or float16 [..., K], the result of ``fake_quant`` with this ``global_scale``.
        global_scale: float32 [], from the original amax, or the scale that ``NumberFormat.pack`` finds.
        name: name of the tensor for errors.

    Returns:
        packed uint8 [..., K/2] and block_scale float8_e4m3fn [..., K/16]. Both zeros of ``weight`` become code 0.

    Raises NotRepresentableError, a QADError, with the number of blocks that NVFP4 cannot represent under this global
    scale. It raises at the first tile with such a block, so a weight that was never quantized costs only one tile.

    Example:
        >>> from megatron_qad.formats.nvfp4 import dequantize, fake_quant
        >>> scale, weight = torch.tensor(0.5), fake_quant(torch.arange(16.0), torch.tensor(0.5))
        >>> torch.equal(dequantize(*pack_representable(weight, scale), scale), weight)
        True
    """
    check_quantizable(weight, name, "max")
    check_global_scale(global_scale.float(), name)
    dim, device = weight.shape[-1], weight.device
    scale = global_scale.detach().float().reshape(()).to(device)
    all_blocks = weight.detach().reshape(-1, BLOCK_SIZE).contiguous()
    packed = torch.empty(len(all_blocks), BLOCK_SIZE // 2, dtype=torch.uint8, device=device)
    block_scale = torch.empty(len(all_blocks), dtype=torch.float8_e4m3fn, device=device)
    tiles = tile_slices(all_blocks)
    size = tiles[0].stop if tiles else 0
    encoder = ExactEncoder(size, weight.dtype, device)
    work = torch.empty(size, BLOCK_SIZE, device=device)
    scratch = torch.empty(size, BLOCK_SIZE, dtype=torch.int32, device=device)
    for part in tiles:
        blocks = all_blocks[part]
        values = blocks if blocks.dtype == torch.float32 else work[: len(blocks)].copy_(blocks)
        amax = amax_bits(values, -1, scratch[: len(blocks)])
        if not bool(torch.isfinite(amax).all()):
            check_finite(values, name, "NVFP4")
        scales = block_scales.max_scale(amax, scale)
        packed[part], wrong = encoder.encode(blocks, values, scales * scale)
        block_scale[part] = scales.view(-1)  # the cast is exact
        if wrong is None:
            continue
        try:
            codes, found = _search(blocks.index_select(0, wrong), scale, name, blocks_seen=part.stop, encoder=encoder)
        except NotRepresentableError:
            check_finite(all_blocks[part.stop :], name, "NVFP4")  # raises, because NaN and Inf are the worse problem
            raise
        packed[part].index_copy_(0, wrong, codes)
        # PyTorch has no indexed assignment of float8 on the CPU, so view it as uint8.
        block_scale[part].view(torch.uint8).index_copy_(0, wrong, found.view(torch.uint8))
    return packed.view(*weight.shape[:-1], dim // 2), block_scale.view(*weight.shape[:-1], dim // BLOCK_SIZE)


def is_representable(weight: Tensor, global_scale: Tensor, *, name: str = "tensor") -> bool:
    """Whether ``pack_representable`` would succeed. NaN and Inf still raise QADError."""
    try:
        pack_representable(weight, global_scale, name=name)
    except NotRepresentableError:
        return False
    return True


def _search(blocks: Tensor, scale: Tensor, name: str, blocks_seen: int, encoder: ExactEncoder) -> tuple[Tensor, Tensor]:
    """Search for the smallest E4M3 scale that decodes each block [B, 16] exactly.

    If the block's amax is a subnormal number of its dtype, the scale may be any that decodes exactly.

    The largest value of a representable block is c * s * global_scale, where c is an E2M1 value. At most seven scales
    are possible: the E4M3 numbers nearest to amax / (c * global_scale). Rounding to nearest finds s, because the
    relative error of amax is smaller than half a step of E4M3, which is at least 2^-5 for normal and 1/14 for subnormal
    E4M3 numbers. The error from the float32 products is 2^-23, or 2^-13 if they are subnormal (the smallest is
    0.5 * 2^-9 * 2^-126); the error from rounding to the weight's dtype is 2^-9 for normal numbers of that dtype. Only a
    block whose amax is subnormal in its own dtype (such as a float16 expert near 1e-6) may need all 126 scales.

    Args:
        blocks: [B, 16] in any float dtype.
        scale: the global scale, float32 [], on the same device.

    Returns:
        packed codes uint8 [B, 8] and scales float8_e4m3fn [B].
    """
    amax = amax_bits(blocks.float(), -1).view(-1)
    codes = torch.empty(len(blocks), BLOCK_SIZE // 2, dtype=torch.uint8, device=blocks.device)
    scales = torch.empty(len(blocks), dtype=torch.uint8, device=blocks.device)  # E4M3 bytes
    left, blocks_left = torch.arange(len(blocks), device=blocks.device), blocks
    for largest in _LARGEST_CODES:
        candidates = (amax.index_select(0, left) / (largest * scale)).clamp_(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
        decode_scale = (candidates.float() * scale).unsqueeze(-1)
        tried, wrong = encoder.encode(blocks_left, blocks_left.float(), decode_scale)
        # Wrong blocks are overwritten in a later round.
        codes.index_copy_(0, left, tried)
        scales.index_copy_(0, left, candidates.view(torch.uint8))
        if wrong is None:
            return codes, scales.view(torch.float8_e4m3fn)
        left, blocks_left = left[wrong], blocks_left.index_select(0, wrong)
    subnormal = amax[left] < torch.finfo(blocks.dtype).tiny
    num_unsolved = int((~subnormal).sum())
    if not num_unsolved:
        candidates = torch.arange(1, 0x7F, dtype=torch.uint8, device=blocks.device)
        decode_scales = candidates.view(torch.float8_e4m3fn).float() * scale
        for part in left.split(_SEARCH_BLOCKS):
            tried, exact = _encode_exactly(blocks[part].unsqueeze(1), decode_scales)  # [B, 126, 16] and [B, 126]
            first = exact.int().argmax(dim=-1)
            best = tried[torch.arange(len(part), device=part.device), first]
            codes[part], scales[part] = pack_codes(best), candidates[first]
            num_unsolved += int((~exact.any(dim=-1)).sum())
    if num_unsolved:
        raise NotRepresentableError(
            f"{name}: at least {num_unsolved} of the first {blocks_seen} blocks of {BLOCK_SIZE} values are not "
            f"representable in NVFP4 under the global scale {scale.item()}. Expected a tensor fake-quantized "
            "with exactly this scale. Check whether it was changed since, or whether it shares another tensor's scale."
        )
    return codes, scales.view(torch.float8_e4m3fn)


def _encode_exactly(blocks: Tensor, decode_scales: Tensor) -> tuple[Tensor, Tensor]:
    """Encode blocks [..., 16] under float32 scales [...]. Return the codes and bool [...], true if they are exact."""
    decode_scales = decode_scales.unsqueeze(-1)
    codes = encode(blocks.float() / decode_scales)
    decoded = (decode_codes(codes) * decode_scales).to(blocks.dtype)
    return codes, (decoded == blocks).all(dim=-1)
