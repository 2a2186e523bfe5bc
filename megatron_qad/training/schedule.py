"""The one seam in Megatron's loop that has no hook: the schedule.

``megatron.training.training`` asks ``get_forward_backward_func`` for the function that runs all microbatches of a step.
``wrap_schedule`` wraps what it answers, there and nowhere else, because a step of QAD is: read the microbatches, run the
teacher over them, put the student's weights on the NVFP4 grid, then run the student's own schedule unchanged.
"""

from collections.abc import Callable

from megatron.training import training as megatron_loop

from megatron_qad.quantization.activations import InputQuantizers
from megatron_qad.quantization.weights import InPlaceWeights
from megatron_qad.training.batch import Batch, iterators, logits_of, read_batches
from megatron_qad.training.teacher import Teacher


class QADStep:
    """What surrounds the student's schedule in every step, training and evaluation alike.

    Args:
        teacher: None for a loss that needs none.
        weights: the student's weights to quantize in place.
        inputs: the student's input quantizers; calibrated here before they are first used.
        calibration_samples: sequences that calibration sees, on each data-parallel rank.
    """

    def __init__(
        self, teacher: Teacher | None, weights: InPlaceWeights, inputs: InputQuantizers, calibration_samples: int
    ):
        self.teacher = teacher
        self.weights = weights
        self.inputs = inputs
        self.calibration_samples = calibration_samples
        self._read_ahead: list[Batch] = []

    def run(self, schedule: Callable, *, data_iterator, model, num_microbatches: int, forward_step_func, **rest):
        shape = {name: rest.get(name) for name in ("seq_length", "micro_batch_size", "decoder_seq_length")}
        if not self.inputs.calibrated:
            self._calibrate(schedule, data_iterator, model, forward_step_func, shape)
        batches = self._next_batches(data_iterator, num_microbatches, shape)
        if self.teacher is not None:
            self.teacher.annotate(batches, data_iterator, **shape)
        with self.weights.on_grid():
            return schedule(
                data_iterator=iterators(batches, data_iterator),
                model=model,
                num_microbatches=num_microbatches,
                forward_step_func=forward_step_func,
                **rest,
            )

    def _next_batches(self, data_iterator, number: int, shape: dict) -> list[Batch]:
        ready, self._read_ahead = self._read_ahead[:number], self._read_ahead[number:]
        missing = number - len(ready)
        if missing:
            ready += read_batches(data_iterator, missing, shape["micro_batch_size"], shape["seq_length"])
        return ready

    def _calibrate(self, schedule, data_iterator, model, forward_step_func, shape) -> None:
        """Max calibration with unquantized weights. Its microbatches go back: training sees the data it would have seen."""
        number = -(-self.calibration_samples // shape["micro_batch_size"])
        batches = read_batches(data_iterator, number, shape["micro_batch_size"], shape["seq_length"])
        self._read_ahead = batches
        with self.inputs.calibrating():
            schedule(
                data_iterator=iterators(batches, data_iterator),
                model=model,
                num_microbatches=number,
                forward_step_func=_only_forward,
                forward_only=True,
                **shape,
            )


def _only_forward(batches, model):
    batch = next(batches)
    return logits_of(model, batch), lambda logits: (logits.new_zeros(()), logits.new_zeros((), dtype=int), {})


def wrap_schedule(step: QADStep) -> None:
    """Make Megatron's loop run ``step`` around every schedule. Once a process."""
    upstream = megatron_loop.get_forward_backward_func

    def get_forward_backward_func(*args, **kwargs):
        schedule = upstream(*args, **kwargs)
        return lambda **call: step.run(schedule, **call)

    megatron_loop.get_forward_backward_func = get_forward_backward_func
