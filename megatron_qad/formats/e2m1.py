"""E2M1, the 4-bit float of NVFP4: rounding, encoding, and packing two codes per byte."""

import torch
from torch import Tensor

from megatron_qad.formats.common import round_mantissa_

E2M1_MAX = 6.0
# Code 8 is -0.0. It decodes to +0.0, as in modelopt, so that packing a decoded tensor is exact.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


_BITS_OF_ONE = 0x3F800000


def round_to_e2m1_(scaled: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Round float32 to E2M1 values in place. Values saturate at 6; zero becomes +0.0.

    E2M1 keeps one bit after the leading one: the step is 0.5 below 2, 1 below 4 and 2 up to 6. Rounding a tie to the
    even multiple of the step also selects the even code. ``scratch``: int32 of the same shape, overwritten.
    """
    scaled.clamp_(-E2M1_MAX, E2M1_MAX)
    return round_mantissa_(scaled, 1.5 * 2.0**22, _BITS_OF_ONE, scratch)


def encode(scaled: Tensor) -> Tensor:
    """Return the uint8 codes 0..15 of float32 values that are already divided by their scale. Overwrites ``scaled``.

    A negative number that rounds to zero keeps its sign (code 8); -0.0 becomes code 0.
    """
    sign = (scaled < 0).to(torch.uint8) << 3
    doubled = round_to_e2m1_(scaled).abs_().mul_(2.0).to(torch.uint8)  # 0 1 2 3 4 6 8 12
    code = torch.minimum(doubled, (doubled >> 1) + 2)  # 0 1 2 3 4 5 6 8
    return torch.minimum(code, (doubled >> 2) + 4) | sign  # 0 1 2 3 4 5 6 7


def decode_codes(codes: Tensor) -> Tensor:
    """Return the float32 E2M1 values of uint8 codes 0..15, in the same shape. Both zeros decode to +0.0."""
    return torch.tensor(E2M1_VALUES, device=codes.device)[codes.int()]


def pack_codes(codes: Tensor) -> Tensor:
    """Pack uint8 codes 0..15 [..., K] into uint8 [..., K/2], with the even column in the low nibble."""
    return codes[..., 1::2] << 4 | codes[..., 0::2]


def unpack_codes(packed: Tensor) -> Tensor:
    """Unpack uint8 [..., K/2] into codes 0..15, uint8 [..., K]: the inverse of ``pack_codes``."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
