"""Encoding of NVFP4 blocks that are expected to be representable already, with a check of every value.

For such blocks, rounding is only a way to find the nearest E2M1 number: the quotient of a value and its block's scale
is within 2^-7 of one, so the cheapest rounding serves. Whether the block is representable is decided afterwards, by
decoding its codes with the arithmetic of ``nvfp4.dequantize``. Most steps work on the 16 bits of a bfloat16, which take
half the time of float32, and in buffers that are allocated once and stay in the cache.
"""

import torch
from torch import Tensor

from megatron_qad.formats.e2m1 import E2M1_MAX

_HALVES = 1.5 * 2.0**22  # adding and subtracting it rounds a small float32 to a multiple of 0.5, and -0.0 to +0.0
# E2M1 numbers as bfloat16: the low bit of the exponent's 8 bits and the first of the mantissa's 7 bits count them from
# 1.0 on, so one step is 1 << 6. The number 0.5 is 0x3F00, two steps below 1.0, although its code is one below.
_STEP = 1 << 6
_BELOW_HALF = 0x3F00 - _STEP
_MAGNITUDE = 0x7FFF


class ExactEncoder:
    """Encoder of blocks of 16 values, up to ``max_blocks`` at a time, that finds those which are not representable.

    Example:
        >>> blocks, scale = torch.tensor([[0.5, 1.0, -6.0, *[0.0] * 13]]), torch.ones(1, 1)
        >>> ExactEncoder(1, torch.float32, blocks.device).encode(blocks, blocks, scale)
        (tensor([[33, 15,  0,  0,  0,  0,  0,  0]], dtype=torch.uint8), None)
    """

    def __init__(self, max_blocks: int, dtype: torch.dtype, device: torch.device):
        size = (max_blocks, 16)
        self._work = torch.empty(size, dtype=torch.float32, device=device)
        self._rounded, self._shifted, self._signs = (
            torch.empty(size, dtype=torch.int16, device=device) for _ in range(3)
        )
        self._pairs = torch.empty(max_blocks, 8, dtype=torch.int32, device=device)
        self._decoded = torch.empty(size, dtype=dtype, device=device)

    def encode(self, blocks: Tensor, values: Tensor, decode_scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode contiguous blocks [B, 16].

        Args:
            blocks: finite values in the dtype of the encoder.
            values: the same in float32; not changed.
            decode_scale: float32 [B, 1], the product of block scale and global scale.

        Returns:
            packed codes, uint8 [B, 8], and the indices, int64 [n], of the blocks whose codes decode to other values;
            None instead if there are none. -0.0 has code 0, which decodes to 0.0.
        """
        count = len(blocks)
        rounded = self._round(values, decode_scale)
        packed = self._pack(rounded)
        # The comparison: E2M1 numbers times the scale, rounded once to the dtype, as in nvfp4.dequantize.
        work = self._work[:count].copy_(rounded.view(torch.bfloat16)).mul_(decode_scale)
        decoded = work if blocks.dtype == torch.float32 else self._decoded[:count].copy_(work)
        bits, expected = decoded.view(torch.int64), blocks.view(torch.int64)
        if torch.equal(bits, expected):
            return packed, None
        wrong = (bits != expected).any(dim=-1).nonzero().view(-1)
        # Now as numbers: -0.0 equals 0.0.
        differ = decoded.index_select(0, wrong) != blocks.index_select(0, wrong)
        wrong = wrong[differ.view(torch.int64).ne(0).any(dim=-1)]
        return packed, wrong if len(wrong) else None

    def _round(self, values: Tensor, decode_scale: Tensor) -> Tensor:
        """Return the nearest E2M1 numbers, as the bits of bfloat16 in int16 [B, 16]."""
        work, rounded = self._work[: len(values)], self._rounded[: len(values)]
        torch.div(values, decode_scale, out=work)
        work.add_(_HALVES).sub_(_HALVES).clamp_(-E2M1_MAX, E2M1_MAX)
        rounded.view(torch.bfloat16).copy_(work)
        return rounded.add_(_STEP // 2).bitwise_and_(-_STEP)  # one bit of mantissa

    def _pack(self, rounded: Tensor) -> Tensor:
        """Return the codes of E2M1 numbers, two per byte."""
        count = len(rounded)
        shifted, signs, pairs = self._shifted[:count], self._signs[:count], self._pairs[:count]
        torch.bitwise_and(rounded, _MAGNITUDE, out=shifted)
        shifted.sub_(_BELOW_HALF).clamp_(min=0)  # in steps: 0, 1 (for 0.5), 3 (for 1.0), 4, 5, 6, 7, 8
        torch.sub(shifted, _STEP, out=signs)
        codes = torch.minimum(shifted, signs.clamp_(min=_STEP), out=shifted).bitwise_right_shift_(6)
        torch.bitwise_right_shift(rounded, 12, out=signs).bitwise_and_(8)
        codes.bitwise_or_(signs)
        both = codes.view(torch.int32)  # two codes: bits 0-3 and 16-19
        torch.bitwise_right_shift(both, 12, out=pairs).bitwise_or_(both)
        return pairs.to(torch.uint8)  # keeps the low byte
