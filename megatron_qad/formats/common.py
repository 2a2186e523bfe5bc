"""Helpers shared by all number formats: amax, row tiles, rounding, and checks for NaN and Inf."""

import functools
import importlib.util
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest positive E4M3 number, a subnormal
# Recomputing a scale from the amax of a fake-quantized float32 tensor changes it by at most this many ulps, because the
# products and the division each round once (tests/unit/formats tries all mantissas).
MAX_ULPS = 1

# A tile is processed in two float32 buffers of 512 KiB that are allocated once per call. They and the tile fit into the
# L2 cache; fresh buffers per tile would cost more in page faults than the arithmetic.
_TILE_ELEMENTS = 1 << 17
_GPU_TILE_ELEMENTS = 1 << 24  # each tile costs kernel launches and a synchronization
_EXPONENT_BITS = 0x7F800000
_MAGNITUDE_BITS = 0x7FFFFFFF
_BITS_OF_2_TO_MINUS_6 = 0x3C800000  # the smallest normal E4M3 number


class NotRepresentableError(QADError):
    """Raised when a tensor cannot be packed exactly: its format cannot represent all values under the given scale."""


def triton_serves(x: Tensor) -> bool:
    """Whether the Triton kernels can process ``x``: it is on a GPU and Triton is installed. Otherwise torch does it."""
    return x.device.type == "cuda" and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def tensor_amax(x: Tensor) -> Tensor:
    """Return the largest magnitude of ``x`` (any shape, any float dtype) as float32 [].

    It is NaN if ``x`` contains NaN, and 0 for an empty tensor.
    """
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())  # no |x| temporary
    return torch.maximum(-low, high).float()


def amax_bits(x: Tensor, dim: int, scratch: Tensor | None = None) -> Tensor:
    """Return the largest magnitude of float32 ``x`` along ``dim`` (kept) as float32; NaN where ``x`` contains NaN.

    The reduction compares bit patterns as integers: they order like magnitudes, with NaN above infinity, and integers
    reduce faster than floats. ``scratch``: int32 of ``x``'s shape, overwritten.
    """
    bits = torch.bitwise_and(x.view(torch.int32), _MAGNITUDE_BITS, out=scratch)
    return bits.amax(dim=dim, keepdim=True).view(torch.float32)


def round_to_e4m3_(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Round float32 in place to the nearest E4M3 numbers, kept as float32. Ties go to even; values saturate at 448.

    Adding and subtracting 1.5 * 2^20 times the largest power of two <= |x| makes the hardware round to three bits
    after the leading one. Below 2^-6 the step stays 2^-9. Zero becomes +0.0. The result equals a cast to float8_e4m3fn
    and back, which takes ten times as long on the CPU. ``scratch``: int32 of ``x``'s shape, overwritten.
    """
    x.clamp_(-E4M3_MAX, E4M3_MAX)
    return round_mantissa_(x, 1.5 * 2.0**20, _BITS_OF_2_TO_MINUS_6, scratch)


def round_mantissa_(x: Tensor, magic: float, smallest_bits: int, scratch: Tensor | None = None) -> Tensor:
    """Round float32 in place to multiples of ``p * 2^-23 * 2^floor(log2(magic))``, ties to even.

    ``p`` is the largest power of two <= ``abs(x)``, but at least the float32 whose bits are ``smallest_bits``.
    """
    power = torch.bitwise_and(x.view(torch.int32), _EXPONENT_BITS, out=scratch)
    power = power.clamp_(min=smallest_bits).view(torch.float32)
    return x.add_(power, alpha=magic).sub_(power, alpha=magic)  # the products are exact, fused or not


def tile_slices(rows: Tensor) -> list[slice]:
    """Return row slices that divide [M, K] into tiles. The first is the largest; an empty tensor has none."""
    if not rows.numel():
        return []
    elements = _TILE_ELEMENTS if rows.device.type == "cpu" else _GPU_TILE_ELEMENTS
    step = min(max(1, elements // rows.shape[1]), rows.shape[0])
    return [slice(start, min(start + step, rows.shape[0])) for start in range(0, rows.shape[0], step)]


def check_finite(x: Tensor, name: str, format_name: str) -> None:
    """Raise QADError with the number of NaN and Inf values of ``x``, if there are any."""
    if num_bad := int((~torch.isfinite(x)).sum()):
        raise QADError(
            f"{name}: {num_bad} of {x.numel()} values checked are NaN or Inf, which {format_name} cannot represent. "
            "They were there before quantization. Check the checkpoint or the step that wrote the tensor."
        )


def check_blocks(bad: Tensor, names: Sequence[str]) -> None:
    """Raise QADError that lists the tensors with bad blocks. Synchronizes with the device.

    Args:
        bad: int [n], the number of blocks with NaN or Inf of each tensor, as a kernel counted them.
        names: n names of the tensors.
    """
    counts = [f"{name}: {count} blocks" for name, count in zip(names, bad.tolist(), strict=True) if count]
    if counts:
        raise QADError(
            f"{'; '.join(counts[:8])}{f' and {len(counts) - 8} more tensors' if len(counts) > 8 else ''} hold NaN or "
            "Inf, which NVFP4 cannot represent. They were there before quantization. Check the checkpoint or the step "
            "that wrote the tensors."
        )


def neighbours(scale: Tensor) -> Iterable[Tensor]:
    """Yield the float32 scale, then the float32 numbers within MAX_ULPS of it, nearest first."""
    yield scale
    above = below = scale
    for _ in range(MAX_ULPS):
        above = torch.nextafter(above, torch.full_like(above, torch.inf))
        below = torch.nextafter(below, torch.zeros_like(below))
        yield above
        yield below
