"""Calibrators: collect the magnitudes of a linear's inputs and compute the amax from them.

The maximum keeps the largest magnitude. A percentile counts magnitudes and takes the smallest amax that covers the
requested percentage of them; larger values saturate. The histogram has one bin per non-negative bfloat16 value, so
percentiles of bfloat16 inputs are exact. Its counts are integers, so the result does not depend on the number of ranks
or the order of samples. ``headroom`` has a third calibrator.
"""

from collections.abc import Mapping

import torch
from modelopt.torch.quantization.calib import MaxCalibrator

from megatron_qad.formats.common import tensor_amax
from megatron_qad.quantization.names import of_all_experts

_NUM_BINS = 0x7F80  # bfloat16 bit patterns from 0 up to, but not including, infinity
_CHUNK = 1 << 20  # elements per bincount call, which needs an int64 copy


class RunningAmax(MaxCalibrator):
    """Max calibrator that keeps NaN and Inf in the maximum instead of raising.

    modelopt's calibrator raises on NaN, without the linear's name and on one rank only. Here all ranks raise together,
    with the name, after the passes, and no pass waits for the device."""

    num_bins = 0
    """Number of bins of the histogram; 0 if the maximum is the amax."""
    counts: torch.Tensor | None = None
    """Histogram, int64 [num_bins], on the device of the inputs. None before the first input."""

    def zero_counts(self, device) -> torch.Tensor:
        """Return an empty histogram."""
        return torch.zeros(self.num_bins, dtype=torch.int64, device=device)

    def amax_of_counts(self, counts: torch.Tensor, maximum: torch.Tensor) -> tuple[torch.Tensor, str | None]:
        """Return the amax, float32 [], and a warning, from a histogram and a maximum that were reduced over all ranks.

        Only calibrators with bins have it."""
        raise NotImplementedError

    def collect(self, x: torch.Tensor) -> None:
        if x.numel() == 0:  # no token reached an expert of this rank
            return
        amax = tensor_amax(x)
        self._calib_amax = amax if self._calib_amax is None else torch.maximum(self._calib_amax, amax)


class MagnitudeCounts(RunningAmax):
    """Calibrator that keeps the maximum and a histogram of magnitudes, rounded up to bfloat16.

    Args:
        percentile: percentage of the non-zero magnitudes that the amax covers.
    """

    num_bins = _NUM_BINS

    def __init__(self, percentile: float):
        super().__init__()
        self._percentile = percentile

    def collect(self, x: torch.Tensor) -> None:
        super().collect(x)
        if self.counts is None:
            self.counts = self.zero_counts(x.device)
        for chunk in x.detach().reshape(-1).split(_CHUNK):
            # The upper 16 bits of a float32 are a bfloat16; adding 0xFFFF first rounds magnitudes up.
            bits = ((chunk.float().abs().view(torch.int32) + 0xFFFF) >> 16).clamp_(max=_NUM_BINS - 1)
            self.counts += torch.bincount(bits.long(), minlength=_NUM_BINS)

    def amax_of_counts(self, counts: torch.Tensor, maximum: torch.Tensor) -> tuple[torch.Tensor, str | None]:
        return percentile_amax(counts, self._percentile), None


def percentile_amax(counts: torch.Tensor, percentile: float) -> torch.Tensor:
    """Return the smallest amax that covers ``percentile`` % of the counted non-zero magnitudes.

    Args:
        counts: histogram, int64 [..., 32640], summed over all ranks.
        percentile: greater than 0, at most 100.

    Returns:
        float32 [...]; 0 where only zeros were counted.
    """
    counts = counts.clone()
    counts[..., 0] = 0  # zeros from padding and ReLU do not describe the range
    total = counts.sum(-1, keepdim=True)
    # float64 represents counts up to 2^53 exactly.
    target = torch.ceil(total.double() * (percentile / 100)).long().clamp_(min=1)
    first = torch.searchsorted(counts.cumsum(-1), target).squeeze(-1)
    edges = (torch.arange(_NUM_BINS, dtype=torch.int32, device=counts.device) << 16).view(torch.float32)
    return torch.where(total.squeeze(-1) == 0, 0.0, edges[first.clamp(max=_NUM_BINS - 1)])


def largest_over_experts(amaxes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the amaxes by name, with the largest of a layer's experts for all of them, as servers compute.

    They are equal already, except in checkpoints of older versions, in which each expert was calibrated alone.
    """
    largest: dict[str, torch.Tensor] = {}
    for name, amax in amaxes.items():
        shared = of_all_experts(name)
        largest[shared] = torch.maximum(amax, largest.get(shared, amax))
    return {name: largest[of_all_experts(name)] for name in amaxes}
