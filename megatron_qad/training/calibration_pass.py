"""Calibration before the first step: forward passes with unquantized weights that set the amaxes of the quantizers.

The microbatches are returned afterwards, so that training sees the same data as without calibration.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from megatron.training.utils import is_rank0
from tqdm import tqdm

from megatron_qad.models.output_layer import ModelOutput
from megatron_qad.training.batch import Batch, iterators, num_calibration_batches


class CalibrationPass:
    """Calibrates the student's quantizers once, and reads the microbatches of every step.

    Args:
        job: the ``QADJob``, whose ``activations`` are set.
    """

    def __init__(self, job):
        self._job = job
        self._is_calibrated = False  # the same on all ranks
        self._read_ahead: list[Batch] = []
        self._was_training = False

    def next_batches(
        self, schedule: Callable, data_iterator, num_microbatches: int, shape: dict, model, is_training: bool
    ) -> list[Batch]:
        """Return the microbatches of a step, after calibrating if this is the first call.

        Microbatches that calibration has read ahead come first. Those read from training data are only returned in
        training, those read in an evaluation only in evaluations.
        """
        if self._must_calibrate():
            self._calibrate(schedule, data_iterator, shape, model)
            self._was_training = is_training
        ready: list[Batch] = []
        if is_training == self._was_training:
            ready, self._read_ahead = self._read_ahead[:num_microbatches], self._read_ahead[num_microbatches:]
        num_missing = num_microbatches - len(ready)
        return ready + self._read(data_iterator, num_missing, shape) if num_missing else ready

    def calibrate(self, data_iterator, shape: dict, model) -> None:
        """Calibrate on the next microbatches of ``data_iterator`` if a quantizer has no amax; no step reads them again.

        Args:
            shape: "seq_length", "micro_batch_size" and "decoder_seq_length", as arguments of a schedule.
            model: the student's chunks, wrapped or not.
        """
        if self._must_calibrate():
            self._calibrate(get_forward_backward_func(), data_iterator, shape, model)
            self._read_ahead = []

    def _must_calibrate(self) -> bool:
        """Whether any rank has a quantizer without an amax. Ranks without quantizers then run the passes, too."""
        if self._is_calibrated:
            return False
        is_missing = not self._job.activations.calibrated
        missing = torch.tensor(is_missing, dtype=int, device=torch.cuda.current_device())
        torch.distributed.all_reduce(missing, op=torch.distributed.ReduceOp.MAX)
        self._is_calibrated = True
        return bool(missing)

    def _read(self, data_iterator, num_microbatches: int, shape: dict) -> list[Batch]:
        return self._job.reader.read(data_iterator, num_microbatches, shape["micro_batch_size"], shape["seq_length"])

    def _calibrate(self, schedule: Callable, data_iterator, shape: dict, model) -> None:
        job = self._job
        num_microbatches = num_calibration_batches(
            job.config.options.qad_calibration_samples, shape["micro_batch_size"]
        )
        job.events.phase("calibration", is_long=False)
        self._read_ahead = self._read(data_iterator, num_microbatches, shape)
        bar = tqdm(total=num_microbatches, unit="microbatch", desc="calibrating", disable=None if is_rank0() else True)

        def count_pass() -> None:
            job.num_passes += 1
            bar.update()

        with job.activations.calibrating(), bar:
            schedule(
                data_iterator=iterators(self._read_ahead, data_iterator),
                model=model,
                num_microbatches=num_microbatches,
                forward_step_func=partial(forward_without_loss, job, ModelOutput.hidden, count_pass),
                forward_only=True,
                **job.reader.schedule_shape(**shape),
            )


def forward_without_loss(
    job, finish: Callable[[ModelOutput], torch.Tensor], on_batch: Callable[[], None], batches: Iterator[Batch], model
):
    """Forward step for Megatron's schedules that computes no loss.

    Args:
        finish: called with the output if the output layer is fused with the loss and has not run in the model.
        on_batch: called once per microbatch.
    """
    is_fused = job.config.output_mode.fused

    def no_loss(output):
        if is_fused:
            finish(ModelOutput(output, unwrap_model(model)))
        return output.new_zeros(()), output.new_zeros((), dtype=int), {}

    on_batch()
    return job.forward(model, next(batches), hidden=is_fused), no_loss
