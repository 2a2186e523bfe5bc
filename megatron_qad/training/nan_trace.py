"""Traces NaN and Inf to the layer where they first appear.

The forward passes of the step are replayed with a hook on every module, on every rank; then the gradients are checked.
The trace reports the first module whose output is not finite, in the teacher and then in the student, or else the
parameter that the backward pass reached first. ``callbacks.nan_guard`` acts on the result.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from megatron.core import mpu

from megatron_qad.models.output_layer import ModelOutput
from megatron_qad.quantization.names import linear_weights, name_is_shared, named_modules_globally
from megatron_qad.training.calibration_pass import forward_without_loss


class NaNTrace:
    """The first NaN or Inf that this rank finds.

    Example::

        trace = NaNTrace()
        with trace.check_outputs(model, "the student", order=1):
            run_forward_pass()
        trace.check_gradients(model, order=2)
    """

    def __init__(self):
        self.first: tuple[int, int, str] | None = None
        """(order of the pass, order of the pipeline stage within the pass, message), or None."""

    @contextmanager
    def check_outputs(self, chunks: Sequence[torch.nn.Module], model_name: str, order: int) -> Iterator[None]:
        """Context manager: records the first module of ``chunks`` whose output is not finite."""
        handles = []

        def hook(name):
            def check(module, args, output):
                for tensor in output if isinstance(output, (tuple, list)) else (output,):
                    if self.first is None and torch.is_tensor(tensor) and tensor.is_floating_point():
                        if bad := int((~tensor.isfinite()).sum()):
                            values = f"{bad} of {tensor.numel()} values"
                            message = f"{model_name}: {values} in the output of {name} are NaN or Inf"
                            self.first = (order, mpu.get_pipeline_model_parallel_rank(), message)

            return check

        for chunk in chunks:
            for name, module in named_modules_globally(chunk):
                handles.append(module.register_forward_hook(hook(name or type(module).__name__)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check_gradients(self, chunks: Sequence[torch.nn.Module], order: int) -> None:
        """Record the parameter nearest to the loss whose gradient is not finite."""
        if self.first is not None:
            return
        for chunk in chunks:
            for module_name, module in named_modules_globally(chunk):
                for kind, parameter in module.named_parameters(recurse=False):
                    grad = getattr(parameter, "main_grad", parameter.grad)
                    if grad is not None and (bad := int((~grad.isfinite()).sum())):
                        name = f"{module_name}.{kind}"
                        if name_is_shared(module_name):
                            experts = linear_weights(module_name, module).items()
                            name = next(n for n, expert in experts if not expert.part_of(grad).isfinite().all())
                        message = f"the gradient: {bad} of {grad.numel()} values of {name} are NaN or Inf"
                        # Modules come in forward order, so the last one is kept; later stages come first.
                        self.first = (order, -mpu.get_pipeline_model_parallel_rank(), message)

    def gather(self) -> list[tuple[int, str]]:
        """Return (rank, message) of every rank that found a NaN or Inf, the earliest first. Collective."""
        results: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(results, self.first)
        ranks = [(result[0], result[1], rank, result[2]) for rank, result in enumerate(results) if result is not None]
        return [(rank, message) for _, _, rank, message in sorted(ranks)]


@torch.no_grad()
def replay_last_step(job, model: Sequence[torch.nn.Module], trace: NaNTrace) -> None:
    """Replay the forward passes of the latest training step up to the logits, and check the outputs of both models.

    Args:
        job: the job whose ``last_step`` is replayed.
        model: wrapped chunks of the student.
    """
    step = job.last_step
    if job.teacher is not None and job.config.losses.needs_teacher:
        with trace.check_outputs(job.teacher.chunks, "the teacher", order=0):
            job.teacher.attach_outputs(step.batches, **step.shape)
            for batch in step.batches:
                if batch.teacher_output is not None:
                    batch.teacher_output.logits()
                    batch.teacher_output = None
    with trace.check_outputs(model, "the student", order=1):
        no_loss = partial(forward_without_loss, job, ModelOutput.logits, lambda: None)
        step.run_student(forward_step_func=no_loss, forward_only=True)
