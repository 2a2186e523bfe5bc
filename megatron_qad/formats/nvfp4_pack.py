"""Exact packing of weights that are fake-quantized to NVFP4: the exported weights equal the trained ones bit for bit.

Quantizing a fake-quantized weight again with the ``max`` rule does not always reproduce it. Under another rule, the
largest code of a block need not be 6. Even under ``max``, a block has no code 6 if its scale was rounded up to one of
the few subnormal E4M3 numbers: scale 2 * 2^-9 with largest code 4 is measured again as 4 * 2 / 6 = 1.33 * 2^-9, which
rounds to 1 * 2^-9 and saturates. In float32 the tensor's amax, and with it the global scale, can also change by an ulp.
This module searches for the block scale and the global scale and verifies every result by decoding it. It never
rounds a value.
"""

import torch
from torch import Tensor

from megatron_qad.formats.common import (
    E4M3_MAX,
    E4M3_MIN,
    NotRepresentableError,
    tensor_amax,
    tile_slices,
)
from megatron_qad.formats.e2m1 import decode_codes, encode, pack_codes
from megatron_qad.formats.nvfp4 import (
    BLOCK_SIZE,
    check_global_scale,
    check_quantizable,
    dequantize,
    quantize,
)

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
            remaining = rows[part.stop :]
            if not bool(torch.isfinite(tensor_amax(remaining))):
                quantize(remaining, global_scale, name=name)  # raises, because NaN and Inf are the worse problem
            raise
        packed[part].view(-1, BLOCK_SIZE // 2)[wrong] = pack_codes(codes)
        # PyTorch has no indexed assignment of float8 on the CPU, so view it as uint8.
        block_scale[part].view(torch.uint8).view(-1)[wrong] = scales.view(torch.uint8)
    return packed.view(*weight.shape[:-1], dim // 2), block_scale.view(*weight.shape[:-1], dim // BLOCK_SIZE)


def is_representable(weight: Tensor, global_scale: Tensor, *, name: str = "tensor") -> bool:
    """Whether ``pack_representable`` would succeed. NaN and Inf still raise QADError."""
    try:
        pack_representable(weight, global_scale, name=name)
    except NotRepresentableError:
        return False
    return True


def _wrong_blocks(rows: Tensor, packed: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """Return bool [B], true for blocks whose decoded values differ from ``rows`` (-0.0 equals 0.0)."""
    decoded = dequantize(packed, block_scale, global_scale, rows.dtype)
    return (decoded != rows).reshape(-1, BLOCK_SIZE).any(dim=-1)


def _search(blocks: Tensor, global_scale: Tensor, name: str, blocks_seen: int) -> tuple[Tensor, Tensor]:
    """Search for the smallest E4M3 scale that decodes each block [B, 16] exactly.

    If the block's amax is a subnormal number of its dtype, the scale may be any that decodes exactly.

    The largest value of a representable block is c * s * global_scale, where c is an E2M1 value. At most seven scales
    are possible: the E4M3 numbers nearest to amax / (c * global_scale). Rounding to nearest finds s, because the
    relative error of amax is smaller than half a step of E4M3, which is at least 2^-5 for normal and 1/14 for subnormal
    E4M3 numbers. The error from the float32 products is 2^-23, or 2^-13 if they are subnormal (the smallest is
    0.5 * 2^-9 * 2^-126); the error from rounding to the weight's dtype is 2^-9 for normal numbers of that dtype. Only a
    block whose amax is subnormal in its own dtype (such as a float16 expert near 1e-6) may need all 126 scales.

    Returns:
        codes uint8 [B, 16] and scales float8_e4m3fn [B].
    """
    scale = global_scale.float().reshape(()).to(blocks.device)
    amax = blocks.abs().amax(dim=-1).float()
    codes = torch.zeros(blocks.shape, dtype=torch.uint8, device=blocks.device)
    scales = torch.zeros(len(blocks), dtype=torch.uint8, device=blocks.device)  # E4M3 bytes; 0 means not found
    left = torch.arange(len(blocks), device=blocks.device)
    for largest in _LARGEST_CODES:
        candidates = (amax[left] / (largest * scale)).clamp_(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
        tried, exact = _encode_exactly(blocks[left], candidates.float() * scale)
        codes[left[exact]], scales[left[exact]] = tried[exact], candidates.view(torch.uint8)[exact]
        left = left[~exact]
        if not len(left):
            return codes, scales.view(torch.float8_e4m3fn)
    subnormal = amax[left] < torch.finfo(blocks.dtype).tiny
    num_unsolved = int((~subnormal).sum())
    if not num_unsolved:
        candidates = torch.arange(1, 0x7F, dtype=torch.uint8, device=blocks.device)
        decode_scales = candidates.view(torch.float8_e4m3fn).float() * scale
        for part in left.split(_SEARCH_BLOCKS):
            tried, exact = _encode_exactly(blocks[part].unsqueeze(1), decode_scales)  # [B, 126, 16] and [B, 126]
            first = exact.int().argmax(dim=-1)
            codes[part], scales[part] = tried[torch.arange(len(part), device=part.device), first], candidates[first]
            num_unsolved += int((~exact.any(dim=-1)).sum())
    if num_unsolved:
        raise NotRepresentableError(
            f"{name}: at least {num_unsolved} of the first {blocks_seen} blocks of {BLOCK_SIZE} values are not "
            f"representable in NVFP4 under the global scale {global_scale.item()}. Expected a tensor fake-quantized "
            "with exactly this scale. Check whether it was changed since, or whether it shares another tensor's scale."
        )
    return codes, scales.view(torch.float8_e4m3fn)


def _encode_exactly(blocks: Tensor, decode_scales: Tensor) -> tuple[Tensor, Tensor]:
    """Encode blocks [..., 16] under float32 scales [...]. Return the codes and bool [...], true if they are exact."""
    decode_scales = decode_scales.unsqueeze(-1)
    codes = encode(blocks.float() / decode_scales)
    decoded = (decode_codes(codes) * decode_scales).to(blocks.dtype)
    return codes, (decoded == blocks).all(dim=-1)
