"""Calibration of the inputs of a quantized transformers model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_qad.hf_training.quantize_model import ModelQuantization
from megatron_qad.quantization.calibrated_amaxes import SettingNames, calibrator_of, reduced_amaxes
from megatron_qad.quantization.calibration import RunningAmax

_NAMES = SettingNames("calibration_samples of QADTrainer", "Policy.load(NAME, ['{}'])")


@contextmanager
def calibrating(
    quantization: ModelQuantization,
    groups: Sequence = (),
    *,
    percentile: float | None = None,
    headroom: float | None = None,
) -> Iterator[None]:
    """Forward passes of the model inside this block run unquantized; their inputs give the amaxes. Collective.

    Args:
        groups: process groups over all of whose ranks an amax is taken.
        percentile, headroom: as for ``calibrator_of``.

    Raises:
        QADError: the input of a linear was always zero, or contained NaN or Inf.
    """
    observed = [group for group in quantization.groups if group.input_format is not None]
    for group in quantization.groups:
        is_observed = group.input_format is not None
        group.calibrator = calibrator_of(group.input_format, percentile, headroom) if is_observed else RunningAmax()
    calibrators = {group.module: group.calibrator for group in observed}
    try:
        yield
    finally:
        for group in quantization.groups:
            group.calibrator = None
    device = observed[0].members[0].weight.device if observed else torch.device("cpu")
    formats = {group.module: group.input_format for group in observed}
    amaxes = reduced_amaxes(calibrators, formats, groups, device, _NAMES)
    for group in observed:
        group.set_input_amax(amaxes[group.module])
