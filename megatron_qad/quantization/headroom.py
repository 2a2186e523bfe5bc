"""Calibration that leaves headroom above the inputs of the calibration: modelopt's ``nvfp4_act_headroom``.

NVFP4 has a scale per tensor and one per block, so a larger amax costs nothing as long as the block scales of small
blocks stay normal E4M3 numbers. The amax is therefore anchored at a small block instead of the largest value:

    amax = max(rho * anchor, upper)

``anchor`` is the block amax at percentile 1, ``upper`` that at percentile 99.99. Both are read from a histogram of
log2(block amax), with the bins and defaults of modelopt 0.47 (``NVFP4ActHeadroomCalibrator``). modelopt takes the
maximum of the ranks' results; here the histograms are summed over ranks first, so the result is that of one rank.
"""

import torch
from torch import Tensor

from megatron_qad.formats.input_scales import round_up_to_bf16
from megatron_qad.formats.nvfp4 import BLOCK_SIZE
from megatron_qad.quantization.calibration import RunningAmax

_NUM_BINS = 512
_LOG2_MIN, _LOG2_MAX = -40.0, 40.0
_ANCHOR_PERCENTILE = 1.0
_UPPER_PERCENTILE = 99.99
_SMALLEST_ANCHOR = 1e-6  # as a share of upper: smaller blocks do not count for the anchor


class BlockAmaxCounts(RunningAmax):
    """Calibrator that keeps the maximum and a histogram of the amaxes of blocks of 16 values.

    Args:
        rho: headroom factor, above 0 and below 28672 = 448 / 2^-6, the range of normal E4M3 numbers.
    """

    num_bins = _NUM_BINS

    def __init__(self, rho: float):
        super().__init__()
        self._rho = rho

    def collect(self, x: Tensor) -> None:
        super().collect(x)
        if x.numel() == 0:
            return
        if self.counts is None:
            self.counts = self.zero_counts(x.device)
        block_amax = x.detach().reshape(-1, BLOCK_SIZE).abs().amax(1).float()
        # Zeros have no logarithm; NaN and Inf are reported after the passes.
        block_amax = block_amax[(block_amax > 0) & block_amax.isfinite()]
        self.counts += torch.bincount(_bins(block_amax), minlength=_NUM_BINS)

    def amax_of_counts(self, counts: Tensor, maximum: Tensor) -> tuple[Tensor, str | None]:
        return headroom_amax(counts, maximum, self._rho)


def headroom_amax(counts: Tensor, maximum: Tensor, rho: float) -> tuple[Tensor, str | None]:
    """Return the amax with headroom, rounded up to bfloat16 as a checkpoint stores it.

    Args:
        counts: histogram of block amaxes, int64 [512], summed over all ranks.
        maximum: largest magnitude, float32 [], over all ranks.
        rho: headroom factor.

    Returns:
        float32 [], and a warning if the range of the blocks leaves no headroom. The amax is then ``upper``.
        Without any count, it is the maximum.
    """
    if not bool(counts.any()):
        return maximum, None
    upper = _percentile(counts, _UPPER_PERCENTILE)
    anchor = _percentile(counts, _ANCHOR_PERCENTILE, smallest=upper * _SMALLEST_ANCHOR)
    warning = None
    if rho * anchor <= upper:
        warning = (
            f"blocks differ by a factor of {upper / anchor:.0f}, which leaves no headroom at {rho:g}; the amax is that "
            f"of {_UPPER_PERCENTILE} % of the blocks"
        )
    return round_up_to_bf16(torch.tensor(max(rho * anchor, upper), device=maximum.device)), warning


def _bins(block_amax: Tensor) -> Tensor:
    share = (block_amax.log2() - _LOG2_MIN) / (_LOG2_MAX - _LOG2_MIN)
    return (share * _NUM_BINS).floor().long().clamp_(0, _NUM_BINS - 1)


def _percentile(counts: Tensor, percentile: float, smallest: float = 0.0) -> float:
    """Return the centre of the bin that ``percentile`` % of the blocks in the bins from ``smallest`` on reach."""
    counts = counts.double()  # exact up to 2^53
    if smallest > 0:
        counts[: int(_bins(torch.tensor(smallest)))] = 0
    index = int(torch.searchsorted(counts.cumsum(0), counts.sum() * (percentile / 100)))
    return 2.0 ** (_LOG2_MIN + (min(index, _NUM_BINS - 1) + 0.5) / _NUM_BINS * (_LOG2_MAX - _LOG2_MIN))
