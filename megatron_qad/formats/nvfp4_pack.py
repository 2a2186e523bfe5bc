"""Exact packing of weights that are NVFP4 values already: what was trained is what ships, bit for bit.

A fake-quantized weight is on the grid, but quantizing it again does not always give it back. If the block scale was
one of the few subnormal E4M3 numbers, rounding it up left no code 6 in the block: scale 2 * 2^-9 with largest code 4
is measured again as 4 * 2 / 6 = 1.33 * 2^-9, which picks 1 * 2^-9 and saturates. In float32 also the tensor's amax can
move by an ulp and with it the global scale. Both are searched for here, and every result is verified by decoding it.
Left out: rounding of any kind.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_qad.formats.nvfp4 import (
    BLOCK_SIZE,
    decode_codes,
    dequantize,
    encode,
    global_scale_from_amax,
    pack_codes,
    quantize,
    row_tiles,
    tensor_amax,
)
from megatron_qad.runtime.errors import QADError

_SEARCH_BLOCKS = 1 << 10  # blocks searched at a time: 1024 x 126 scales x 16 values, 8 MiB of float32
# The float32 global scale, recomputed from the amax of a fake-quantized tensor, lies at most this many ulps from the
# original: 448 * s, 6 * (448 * s) and the division each round once (all mantissas are tried in
# tests/unit/formats/test_nvfp4_pack.py).
_MAX_ULPS = 1


def pack_on_grid(weight: Tensor, global_scale: Tensor, *, name: str = "tensor") -> tuple[Tensor, Tensor]:
    """Pack a fake-quantized tensor so that ``dequantize(packed, block_scale, global_scale, weight.dtype)`` equals it.

    Args:
        weight: float32, bfloat16 or float16 [..., K], the result of ``fake_quant`` with this ``global_scale``.
        global_scale: float32 []; from the original amax, or ``recover_global_scale``.

    Returns:
        packed uint8 [..., K/2] and block_scale float8_e4m3fn [..., K/16]. Both zeros of ``weight`` become code 0.

    Raises QADError, with the count, if a block of ``weight`` is no NVFP4 block under this global scale.
    """
    dim = weight.shape[-1] if weight.dim() else 0
    packed, block_scale = quantize(weight, global_scale, name=name)
    rows = weight.detach().reshape(-1, dim)
    packed_rows, scale_rows = packed.view(-1, dim // 2), block_scale.view(-1, dim // BLOCK_SIZE)
    for part in row_tiles(rows):
        wrong = _wrong_blocks(rows[part], packed_rows[part], scale_rows[part], global_scale)
        if not bool(wrong.any()):
            continue
        blocks = rows[part].reshape(-1, BLOCK_SIZE)[wrong]
        codes, scales = _search(blocks, global_scale, name, blocks_seen=part.stop * (dim // BLOCK_SIZE))
        packed_rows[part].view(-1, BLOCK_SIZE // 2)[wrong] = pack_codes(codes)
        # Through uint8 because torch has no indexed assignment of float8 on the CPU.
        scale_rows[part].view(torch.uint8).view(-1)[wrong] = scales.view(torch.uint8)
    return packed, block_scale


def is_on_grid(weight: Tensor, global_scale: Tensor, *, name: str = "tensor") -> bool:
    """Whether ``pack_on_grid`` would succeed. NaN and Inf still raise QADError."""
    try:
        pack_on_grid(weight, global_scale, name=name)
    except OffGridError:
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
    for candidate in _neighbours(scale):
        if all(is_on_grid(weight, candidate, name=name) for weight in tensors):
            return candidate
    raise OffGridError(
        f"{name}: no global scale within {_MAX_ULPS} ulps of {scale.item()} packs it exactly. The weights are not "
        "fake-quantized NVFP4 values: quantize them in place before packing, or export them with `quantize`."
    )


class OffGridError(QADError):
    """A tensor that was to be packed exactly holds values that NVFP4 cannot express under its global scale."""


def _wrong_blocks(rows: Tensor, packed: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """bool [B]: the blocks whose decoded values differ from ``rows`` (-0.0 counts as 0.0)."""
    decoded = dequantize(packed, block_scale, global_scale, rows.dtype)
    return (decoded != rows).reshape(-1, BLOCK_SIZE).any(dim=-1)


def _search(blocks: Tensor, global_scale: Tensor, name: str, blocks_seen: int) -> tuple[Tensor, Tensor]:
    """[B, 16] -> codes uint8 [B, 16] and scales float8_e4m3fn [B]: for each block the smallest E4M3 scale that decodes
    exactly."""
    candidates = torch.arange(1, 0x7F, dtype=torch.uint8, device=blocks.device).view(torch.float8_e4m3fn)
    decode_scales = candidates.float() * global_scale.float().reshape(()).to(blocks.device)
    all_codes, all_scales = [], []
    for chunk in blocks.split(_SEARCH_BLOCKS):
        scaled = chunk.float().unsqueeze(1) / decode_scales.view(1, -1, 1)  # [B, candidates, 16]
        codes = encode(scaled)
        decoded = (decode_codes(codes) * decode_scales.view(1, -1, 1)).to(chunk.dtype)
        exact = (decoded == chunk.unsqueeze(1)).all(dim=-1)
        if unsolved := int((~exact.any(dim=-1)).sum()):  # at once: a tensor that never was quantized fails everywhere
            raise OffGridError(
                f"{name}: at least {unsolved} of the first {blocks_seen} blocks of {BLOCK_SIZE} are no NVFP4 values "
                f"under the global scale {global_scale.item()}, whatever their block scale. Expected a tensor that was "
                "fake-quantized with exactly this scale; was it changed since, or does it share another's scale?"
            )
        first = exact.int().argmax(dim=-1)
        all_codes.append(codes[torch.arange(len(chunk), device=chunk.device), first])
        all_scales.append(candidates.view(torch.uint8)[first])
    return torch.cat(all_codes), torch.cat(all_scales).view(torch.float8_e4m3fn)


def _neighbours(scale: Tensor) -> Iterable[Tensor]:
    """The scale itself, then the float32 numbers next to it, nearest first."""
    yield scale
    above = below = scale
    for _ in range(_MAX_ULPS):
        above = torch.nextafter(above, torch.full_like(above, torch.inf))
        below = torch.nextafter(below, torch.zeros_like(below))
        yield above
        yield below
