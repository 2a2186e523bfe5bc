"""Calibration before the first step: forward passes with unquantized weights that set the amaxes of the quantizers.

If weights have the scale rule ``local_hessian``, a second pass over the same microbatches, with quantized inputs,
collects the second moments of these inputs. Then the scales are chosen.

The microbatches are returned afterwards, so that training sees the same data as without calibration.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from megatron.training import print_rank_0
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
        if any(missing := self._missing()):
            self._calibrate(*missing, schedule, data_iterator, shape, model)
            self._was_training = is_training
        ready: list[Batch] = []
        if is_training == self._was_training:
            ready, self._read_ahead = self._read_ahead[:num_microbatches], self._read_ahead[num_microbatches:]
        num_missing = num_microbatches - len(ready)
        return ready + self._read(data_iterator, num_missing, shape) if num_missing else ready

    def calibrate(self, data_iterator, shape: dict, model) -> None:
        """Calibrate on the next microbatches of ``data_iterator`` if it is needed; no step reads them again.

        Args:
            shape: "seq_length", "micro_batch_size" and "decoder_seq_length", as arguments of a schedule.
            model: the student's chunks, wrapped or not.
        """
        if any(missing := self._missing()):
            self._calibrate(*missing, get_forward_backward_func(), data_iterator, shape, model)
            self._read_ahead = []

    def _missing(self) -> tuple[bool, bool]:
        """Whether any rank has a quantizer without an amax, and whether any has weights that wait for their scales.

        Ranks without them then run the passes, too."""
        if self._is_calibrated:
            return False, False
        here = [not self._job.activations.calibrated, bool(self._job.weights.waiting)]
        missing = torch.tensor(here, dtype=int, device=torch.cuda.current_device())
        torch.distributed.all_reduce(missing, op=torch.distributed.ReduceOp.MAX)
        self._is_calibrated = True
        amaxes, scales = map(bool, missing.tolist())
        return amaxes, scales

    def _read(self, data_iterator, num_microbatches: int, shape: dict) -> list[Batch]:
        return self._job.reader.read(data_iterator, num_microbatches, shape["micro_batch_size"], shape["seq_length"])

    def _calibrate(
        self, needs_amaxes: bool, needs_scales: bool, schedule: Callable, data_iterator, shape: dict, model
    ) -> None:
        job = self._job
        num_microbatches = num_calibration_batches(
            job.config.options.qad_calibration_samples, shape["micro_batch_size"]
        )
        job.events.phase("calibration", is_long=False)
        self._read_ahead = self._read(data_iterator, num_microbatches, shape)
        if job.reader.encoder is not None:
            print_rank_0(
                f"megatron_qad: {_share_of_images(self._read_ahead):.0%} of the calibration's tokens are images"
            )
        run = partial(self._run, schedule, data_iterator, shape, model)
        if needs_amaxes:
            with job.activations.calibrating():
                run("calibrating")
        if needs_scales:
            moments = job.input_moments(job.student, job.weights)
            with moments.collecting():
                run("second moments")
            job.weights.initialize_from_inputs(moments)

    def _run(self, schedule: Callable, data_iterator, shape: dict, model, description: str) -> None:
        """Run the microbatches that were read ahead."""
        job, num_microbatches = self._job, len(self._read_ahead)
        bar = tqdm(total=num_microbatches, unit="microbatch", desc=description, disable=None if is_rank0() else True)

        def count_pass() -> None:
            job.num_passes += 1
            bar.update()

        with bar:
            schedule(
                data_iterator=iterators(self._read_ahead, data_iterator),
                model=model,
                num_microbatches=num_microbatches,
                forward_step_func=partial(forward_without_loss, job, ModelOutput.hidden, count_pass),
                forward_only=True,
                **job.reader.schedule_shape(**shape),
            )


def _share_of_images(batches: Sequence[Batch]) -> float:
    """Return the share of image features among the tokens of a first stage's microbatches; 0 on other stages."""
    features = sum(int((batch.images.feature_index >= 0).sum()) for batch in batches if batch.images is not None)
    return features / max(1, sum(batch.tokens.numel() for batch in batches if batch.tokens is not None))


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
