"""E2M1, the four-bit float of NVFP4: rounding to it, its codes, and two codes a byte."""

import torch
from torch import Tensor

E2M1_MAX = 6.0
# Code 8 is minus zero. It decodes to plus zero, as in modelopt, so that decoding and packing again is the identity.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def round_to_e2m1_(scaled: Tensor) -> Tensor:
    """Round float32 to E2M1 values, in place; beyond 6 it saturates.

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
    doubled = round_to_e2m1_(scaled).abs_().mul_(2.0).to(torch.uint8)  # 0 1 2 3 4 6 8 12
    code = torch.minimum(doubled, (doubled >> 1) + 2)  # 0 1 2 3 4 5 6 8
    return torch.minimum(code, (doubled >> 2) + 4) | sign  # 0 1 2 3 4 5 6 7


def decode_codes(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 -> their E2M1 values, float32, same shape; both zeros are +0.0."""
    return torch.tensor(E2M1_VALUES, device=codes.device)[codes.int()]


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 [..., K] -> uint8 [..., K/2], the even column in the low nibble."""
    return codes[..., 1::2] << 4 | codes[..., 0::2]


def unpack_codes(packed: Tensor) -> Tensor:
    """Inverse of ``pack_codes``: uint8 [..., K/2] -> uint8 [..., K]."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)
