"""What calibration collects of a linear's input, and how an amax is made of it.

``max`` keeps the largest magnitude. ``percentile`` counts magnitudes and takes the smallest amax that covers the asked
share of them; the few values above saturate. The counts have one bin for each positive bfloat16 number, so that a
percentile of bfloat16 inputs is exact; being integers they add up to the same numbers in any order, and the result
depends neither on the number of ranks nor on the order of samples.
"""

import torch
from modelopt.torch.quantization.calib import MaxCalibrator

from megatron_qad.formats.common import tensor_amax

_NUM_BINS = 0x7F80  # bfloat16 bit patterns of 0 up to, not including, infinity
_CHUNK = 1 << 20  # elements counted at a time: bincount needs an int64 copy


class RunningAmax(MaxCalibrator):
    """modelopt's max calibrator stops at a NaN without a name, on one rank of many. Here NaN and Inf stay in the
    maximum until the linear's name is known and all ranks stop together; no pass waits for the device."""

    num_tokens = 0
    """Rows of the inputs so far."""

    def collect(self, x: torch.Tensor) -> None:
        if x.numel() == 0:  # an expert to which no token went
            return
        self.num_tokens += x.numel() // x.shape[-1]
        amax = tensor_amax(x)
        self._calib_amax = amax if self._calib_amax is None else torch.maximum(self._calib_amax, amax)


class MagnitudeCounts(RunningAmax):
    """The maximum, and beside it how many inputs had each magnitude, rounded up to bfloat16."""

    counts: torch.Tensor | None = None
    """int64 [32640], on the inputs' device; None before the first input."""

    def collect(self, x: torch.Tensor) -> None:
        super().collect(x)
        if self.counts is None:
            self.counts = no_counts(x.device)
        for part in x.detach().reshape(-1).split(_CHUNK):
            # The upper half of a float32 is a bfloat16; adding the largest lower half rounds up, away from zero.
            bits = ((part.float().abs().view(torch.int32) + 0xFFFF) >> 16).clamp_(max=_NUM_BINS - 1)
            self.counts += torch.bincount(bits.long(), minlength=_NUM_BINS)


def no_counts(device) -> torch.Tensor:
    return torch.zeros(_NUM_BINS, dtype=torch.int64, device=device)


def make_calibrator(method: str) -> RunningAmax:
    return MagnitudeCounts() if method == "percentile" else RunningAmax()


def percentile_amax(counts: torch.Tensor, percentile: float) -> torch.Tensor:
    """Smallest amax that covers ``percentile`` % of the non-zero magnitudes counted.

    Args:
        counts: int64 [..., 32640], summed over all ranks.
        percentile: above 0, up to 100.

    Returns:
        float32 [...]; 0 where nothing but zeros was counted.
    """
    counts = counts.clone()
    counts[..., 0] = 0  # padding and ReLU zeros say nothing of the range
    total = counts.sum(-1, keepdim=True)
    # Integer target: float64 has room for 2^53 counts.
    target = torch.ceil(total.double() * (percentile / 100)).long().clamp_(min=1)
    first = torch.searchsorted(counts.cumsum(-1), target).squeeze(-1)
    edges = (torch.arange(_NUM_BINS, dtype=torch.int32, device=counts.device) << 16).view(torch.float32)
    return torch.where(total.squeeze(-1) == 0, 0.0, edges[first.clamp(max=_NUM_BINS - 1)])
