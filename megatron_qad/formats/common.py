"""What every format asks of a tensor: its amax, tiles of its rows, and the error for values that are on no grid."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_qad.runtime.errors import QADError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # smallest positive E4M3 number, a subnormal
# A scale recomputed from the amax of a fake-quantized float32 tensor lies at most this many ulps from the original: the
# products and the division each round once (all mantissas are tried in tests/unit/formats).
MAX_ULPS = 1

_TILE_ELEMENTS = 1 << 19  # 2 MiB of float32: stays in cache, and is large enough that call overhead does not count


class OffGridError(QADError):
    """A tensor that was to be packed exactly holds values that its format cannot express under its scale."""


def tensor_amax(x: Tensor) -> Tensor:
    """Largest magnitude of ``x`` (any shape and float dtype) as float32 []; NaN if ``x`` has a NaN; 0 for an empty
    tensor."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())  # no |x| temporary
    return torch.maximum(-low, high).float()


def row_tiles(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows of [M, K], about 2 MiB of float32 each."""
    step = max(1, _TILE_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield slice(start, min(start + step, rows.shape[0]))


def refuse_nonfinite(x: Tensor, name: str, format_name: str) -> None:
    """Raise QADError, with the count: ``x`` holds NaN or Inf. The caller has found that it does."""
    bad = int((~torch.isfinite(x)).sum())
    raise QADError(
        f"{name}: {bad} of {x.numel()} values looked at are NaN or Inf; {format_name} has neither. "
        "The tensor was damaged before quantization: check the checkpoint or the step that wrote it."
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
