"""From calibrators to amaxes: the choice of a calibrator, and the reduction of its results over ranks.

Megatron's jobs and transformers' models (``hf_training``) use the same functions, so equal inputs give equal amaxes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format import NumberFormat
from megatron_qad.quantization.calibration import MagnitudeCounts, RunningAmax
from megatron_qad.quantization.headroom import BlockAmaxCounts
from megatron_qad.quantization.names import name_is_shared


class SettingNames(NamedTuple):
    """What errors of a calibration call the settings that they advise to change."""

    samples: str
    """The number of calibration samples."""
    override: str
    """How a rule is added to the policy; ``{}`` stands for the rule."""


FLAGS = SettingNames("--qad-calibration-samples", "--qad-policy-override '{}'")


def calibrator_of(
    number_format: NumberFormat, percentile: float | None = None, headroom: float | None = None
) -> RunningAmax:
    """Return a new calibrator for an input in ``number_format``: the maximum, unless an option chooses another one.

    Args:
        percentile: percentage of the magnitudes that the amax covers.
        headroom: factor between the amax and a small block (``headroom``). Formats without block scales ignore it.
    """
    if percentile is not None:
        return MagnitudeCounts(percentile)
    if headroom is not None and number_format.block_size > 1:
        return BlockAmaxCounts(headroom)
    return RunningAmax()


def reduced_amaxes(
    calibrators: Mapping[str, RunningAmax],
    number_formats: Mapping[str, NumberFormat],
    groups: Sequence = (),
    device=None,
    names: SettingNames = FLAGS,
) -> dict[str, torch.Tensor]:
    """Return the amaxes by name, float32 scalars that are equal on all ranks.

    Args:
        calibrators: calibrators that have observed the inputs of this rank, by the name of the linear or quantizer; the
            same names in the same order on all ranks.
        number_formats: the format of each input.
        groups: process groups over all of whose ranks the amax is taken.
        device: device of the results; None means the CPU.
        names: names of the settings in errors.

    Raises:
        QADError: an input was always zero, or contained NaN or Inf.
    """
    if not calibrators:
        return {}
    zero = torch.zeros((), dtype=torch.float32, device=device)
    local = [calibrator.compute_amax() for calibrator in calibrators.values()]
    maxima = torch.stack([zero if amax is None else amax.detach().float().reshape(()) for amax in local])
    maxima = torch.where(maxima.isnan(), torch.inf, maxima)  # a max all-reduce may ignore NaN
    for group in groups:
        torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX, group=group)
    _check_finite(dict(zip(calibrators, maxima.tolist(), strict=True)))
    amaxes = {}
    for (name, calibrator), maximum in zip(calibrators.items(), maxima, strict=True):
        amaxes[name] = _amax_of_counts(name, calibrator, maximum, groups) if calibrator.num_bins else maximum
    _check_positive(dict(zip(amaxes, torch.stack(list(amaxes.values())).tolist(), strict=True)), names)
    return {name: number_formats[name].calibrated_amax(amax) for name, amax in amaxes.items()}


def _amax_of_counts(name: str, calibrator: RunningAmax, maximum: torch.Tensor, groups: Sequence) -> torch.Tensor:
    # One all-reduce of at most 255 KiB per quantizer, once per job.
    counts = calibrator.zero_counts(maximum.device) if calibrator.counts is None else calibrator.counts
    for group in groups:
        torch.distributed.all_reduce(counts, group=group)
    amax, warning = calibrator.amax_of_counts(counts, maximum)
    if warning is not None and all(group.rank() == 0 for group in groups):  # once per pipeline stage
        print(f"megatron_qad: WARNING: calibration: the input of {name}: {warning}.", flush=True)
    return amax


def _check_finite(amaxes: dict[str, float]) -> None:
    for name, amax in amaxes.items():
        if amax == float("inf"):
            raise QADError(
                f"calibration: the input of {name} has amax {amax}; expected a finite positive number. "
                "Look for NaN in the weights of the layers before it."
            )


def _check_positive(amaxes: dict[str, float], names: SettingNames) -> None:
    for name, amax in amaxes.items():
        if amax == 0:
            scope = name.partition(".experts.")[0] + ".experts.*" if name_is_shared(name) else name
            what = "no expert of its layer" if name_is_shared(name) else "it never"
            raise QADError(
                f"calibration: the input of {name} has amax 0.0; expected a positive number: {what} received an input "
                f"other than zeros. Calibrate on more samples ({names.samples}), or, if the layer is dead, leave it in "
                f"BF16: {names.override.format(f'{scope}=bf16')}."
            )
