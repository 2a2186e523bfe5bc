"""Calibration before the first step: forward passes with unquantized weights, from which quantizers learn their ranges.

Its microbatches go back: training sees the data that it would have seen.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import print_rank_0
from megatron.training.utils import is_rank0
from tqdm import tqdm

from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import CALIBRATION_FILE
from megatron_qad.models.output_layer import ModelOutput
from megatron_qad.training.batch import Batch, iterators, num_calibration_batches

_MAX_PRINTED = 8


class CalibrationPass:
    """Calibrates the student's quantizers once, and hands out the microbatches of every step.

    Args:
        job: with ``activations``.
    """

    def __init__(self, job):
        self._job = job
        self._is_calibrated = False  # as far as all ranks know
        self._read_ahead: list[Batch] = []
        self._was_training = False

    def next_batches(
        self, schedule: Callable, data_iterator, number: int, shape: dict, model, is_training: bool
    ) -> list[Batch]:
        """The microbatches of a step; before the first one, calibrate.

        What calibration read ahead comes first, but only where it was read: an evaluation between the first steps must
        not be given training data.
        """
        if self._must_calibrate():
            self._calibrate(schedule, data_iterator, shape, model)
            self._was_training = is_training
        ready: list[Batch] = []
        if is_training == self._was_training:
            ready, self._read_ahead = self._read_ahead[:number], self._read_ahead[number:]
        missing = number - len(ready)
        return ready + self._read(data_iterator, missing, shape) if missing else ready

    def _must_calibrate(self) -> bool:
        """Whether any rank has a quantizer without an amax. One without quantizers runs the passes, too."""
        if self._is_calibrated:
            return False
        is_missing = not self._job.activations.calibrated
        missing = torch.tensor(is_missing, dtype=int, device=torch.cuda.current_device())
        torch.distributed.all_reduce(missing, op=torch.distributed.ReduceOp.MAX)
        self._is_calibrated = True
        return bool(missing)

    def _read(self, data_iterator, number: int, shape: dict) -> list[Batch]:
        return self._job.reader.read(data_iterator, number, shape["micro_batch_size"], shape["seq_length"])

    def _calibrate(self, schedule: Callable, data_iterator, shape: dict, model) -> None:
        job = self._job
        number = num_calibration_batches(job.config.options.qad_calibration_samples, shape["micro_batch_size"])
        job.events.phase("calibration", is_long=False)
        self._read_ahead = self._read(data_iterator, number, shape)
        bar = tqdm(total=number, unit="microbatch", desc="calibrating", disable=None if is_rank0() else True)

        def seen() -> None:
            job.num_passes += 1
            bar.update()

        with job.activations.calibrating(), bar:
            schedule(
                data_iterator=iterators(self._read_ahead, data_iterator),
                model=model,
                num_microbatches=number,
                forward_step_func=partial(forward_without_loss, job, ModelOutput.hidden, seen),
                forward_only=True,
                **job.reader.schedule_shape(**shape),
            )
        report_fallbacks(job.activations.fallbacks, job.args.save)


def forward_without_loss(
    job, finish: Callable[[ModelOutput], torch.Tensor], seen: Callable[[], None], batches: Iterator[Batch], model
):
    """A forward step of Megatron's that ends before the loss. ``finish`` runs on the output where the output layer is
    fused with the loss, and so has not run in the model; ``seen`` is called once a microbatch."""
    is_fused = job.config.output_mode.fused

    def no_loss(output):
        if is_fused:
            finish(ModelOutput(output, unwrap_model(model)))
        return output.new_zeros(()), output.new_zeros((), dtype=int), {}

    seen()
    return job.forward(model, next(batches), hidden=is_fused), no_loss


def report_fallbacks(fallbacks: dict[str, tuple[str, int]], save: str | None) -> None:
    """Say which experts' linears saw too few tokens in calibration, of all pipeline stages; beside the checkpoints they
    are in ``calibration.json``."""
    stages: list[dict] = [{} for _ in range(mpu.get_pipeline_model_parallel_world_size())]
    torch.distributed.all_gather_object(stages, fallbacks, group=mpu.get_pipeline_model_parallel_group())
    found = {name: fallback for stage in stages for name, fallback in stage.items()}
    for name, (other, tokens) in list(found.items())[:_MAX_PRINTED]:
        print_rank_0(f"megatron_qad: calibration: {name} saw {tokens} tokens and takes the amax of {other}")
    if len(found) > _MAX_PRINTED:
        print_rank_0(f"megatron_qad: calibration: and {len(found) - _MAX_PRINTED} linears of experts more")
    if save is not None and is_rank0():
        entries = {name: {"tokens": tokens, "amax_of": other} for name, (other, tokens) in found.items()}
        json_records.write_or_warn(Path(save) / CALIBRATION_FILE, {"few_tokens": entries})
