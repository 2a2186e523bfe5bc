"""What every format asks of a tensor: its amax, tiles of its rows, and the error for values that are on no grid."""

import functools
import importlib.util
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest positive E4M3 number, a subnormal
# A scale recomputed from the amax of a fake-quantized float32 tensor lies at most this many ulps from the original: the
# products and the division each round once (all mantissas are tried in tests/unit/formats).
MAX_ULPS = 1

# A tile is worked in two float32 buffers of 512 KiB, allocated once a call: they and the tile stay in a level-2 cache,
# and a page fault a buffer page would cost more than the arithmetic.
_TILE_ELEMENTS = 1 << 17
_GPU_TILE_ELEMENTS = 1 << 24  # there a tile costs launches and a synchronisation
_EXPONENT_BITS = 0x7F800000
_MAGNITUDE_BITS = 0x7FFFFFFF
_BITS_OF_2_TO_MINUS_6 = 0x3C800000  # the smallest normal E4M3 number


class NotRepresentableError(QADError):
    """A tensor that was to be packed exactly holds values that its format cannot express under its scale."""


def triton_serves(x: Tensor) -> bool:
    """Whether kernels may work on ``x``: it is on a GPU and triton is installed. Everything else is torch's."""
    return x.device.type == "cuda" and _triton_is_installed()


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def tensor_amax(x: Tensor) -> Tensor:
    """Largest magnitude of ``x`` (any shape and float dtype) as float32 []; NaN if ``x`` has a NaN; 0 for an empty
    tensor."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())  # no |x| temporary
    return torch.maximum(-low, high).float()


def amax_bits(x: Tensor, dim: int, scratch: Tensor | None = None) -> Tensor:
    """Largest magnitude of float32 ``x`` along ``dim`` (kept), as float32; NaN where there is one.

    Through the bits, because integers order like magnitudes, NaN above infinity, and reduce faster than floats.
    ``scratch``: int32 of ``x``'s shape, overwritten.
    """
    bits = torch.bitwise_and(x.view(torch.int32), _MAGNITUDE_BITS, out=scratch)
    return bits.amax(dim=dim, keepdim=True).view(torch.float32)


def round_to_e4m3_(x: Tensor, scratch: Tensor | None = None) -> Tensor:
    """Round float32 to the nearest E4M3 numbers, in place and still as float32: ties to even, saturating at 448.

    Adding and subtracting 1.5 * 2^20 times the power of two below x leaves three bits behind the leading one, by the
    hardware's own rounding; below 2^-6 the step stays 2^-9. Zero comes out as +0.0. Equal to a cast to float8_e4m3fn
    and back, which on the CPU takes ten times as long. ``scratch``: int32 of ``x``'s shape, overwritten.
    """
    x.clamp_(-E4M3_MAX, E4M3_MAX)
    return round_mantissa_(x, 1.5 * 2.0**20, _BITS_OF_2_TO_MINUS_6, scratch)


def round_mantissa_(x: Tensor, magic: float, smallest_bits: int, scratch: Tensor | None = None) -> Tensor:
    """Round float32 in place to multiples of ``p * 2^-23 * 2^floor(log2(magic))``, p being the power of two at or below
    ``abs(x)`` but at least that of ``smallest_bits``; ties to even."""
    power = torch.bitwise_and(x.view(torch.int32), _EXPONENT_BITS, out=scratch)
    power = power.clamp_(min=smallest_bits).view(torch.float32)
    return x.add_(power, alpha=magic).sub_(power, alpha=magic)  # the products are exact, fused or not


def tile_slices(rows: Tensor) -> list[slice]:
    """Slices of the rows of [M, K] that make tiles; the first is the largest. Empty for an empty tensor."""
    if not rows.numel():
        return []
    elements = _TILE_ELEMENTS if rows.device.type == "cpu" else _GPU_TILE_ELEMENTS
    step = min(max(1, elements // rows.shape[1]), rows.shape[0])
    return [slice(start, min(start + step, rows.shape[0])) for start in range(0, rows.shape[0], step)]


def refuse_nonfinite(x: Tensor, name: str, format_name: str) -> None:
    """Raise QADError, with the count: ``x`` holds NaN or Inf. The caller has found that it does."""
    bad = int((~torch.isfinite(x)).sum())
    raise QADError(
        f"{name}: {bad} of {x.numel()} values looked at are NaN or Inf; {format_name} has neither. "
        "The tensor was damaged before quantization: check the checkpoint or the step that wrote it."
    )


def refuse_bad_blocks(bad: Tensor, names: Sequence[str]) -> None:
    """Raise QADError for the tensors of which a kernel counted blocks with NaN or Inf, int [n]. Synchronises."""
    found = [f"{name}: {count} blocks" for name, count in zip(names, bad.tolist(), strict=True) if count]
    if found:
        raise QADError(
            f"{'; '.join(found[:8])}{f' and {len(found) - 8} more tensors' if len(found) > 8 else ''} hold NaN or Inf; "
            "NVFP4 has neither. The tensor was damaged before quantization: check the checkpoint or the step that "
            "wrote it."
        )


def neighbours(scale: Tensor) -> Iterable[Tensor]:
    """The float32 scale itself, then the float32 numbers within MAX_ULPS of it, nearest first."""
    yield scale
    above = below = scale
    for _ in range(MAX_ULPS):
        above = torch.nextafter(above, torch.full_like(above, torch.inf))
        below = torch.nextafter(below, torch.zeros_like(below))
        yield above
        yield below
