"""Traces NaN and Inf to the layer where they first appear.

The step's forward passes run again with a hook on every module, on every rank; then each parameter's gradient is looked
at. Found is the first module whose output is not finite, the teacher before the student, or else the parameter that the
backward pass reached first. Left out: what is done about it (``callbacks.nan_guard``).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from megatron.core import mpu

from megatron_qad.models.output_layer import ModelOutput
from megatron_qad.quantization.names import named_modules_globally
from megatron_qad.training.calibration_pass import forward_without_loss


class Trace:
    """Where this rank first saw a value that is not finite, and in whose pass."""

    def __init__(self):
        self.found: tuple[int, int, str] | None = None
        """Order of the pass, pipeline stage in the order in which it was reached, sentence."""

    @contextmanager
    def watching(self, chunks: Sequence[torch.nn.Module], who: str, order: int) -> Iterator[None]:
        """Inside, the first module of ``chunks`` to return a value that is not finite is kept."""
        handles = []

        def hook(name):
            def look(module, args, output):
                for tensor in output if isinstance(output, (tuple, list)) else (output,):
                    if self.found is None and torch.is_tensor(tensor) and tensor.is_floating_point():
                        if bad := int((~tensor.isfinite()).sum()):
                            said = f"{who}: {bad} of {tensor.numel()} values in the output of {name} are NaN or Inf"
                            self.found = (order, mpu.get_pipeline_model_parallel_rank(), said)

            return look

        for chunk in chunks:
            for name, module in named_modules_globally(chunk):
                handles.append(module.register_forward_hook(hook(name or type(module).__name__)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def look_at_gradients(self, chunks: Sequence[torch.nn.Module], order: int) -> None:
        """The parameter nearest to the loss whose gradient is not finite."""
        if self.found is not None:
            return
        for chunk in chunks:
            for module_name, module in named_modules_globally(chunk):
                for kind, parameter in module.named_parameters(recurse=False):
                    grad = getattr(parameter, "main_grad", parameter.grad)
                    if grad is not None and (bad := int((~grad.isfinite()).sum())):
                        said = f"the gradient: {bad} of {grad.numel()} values of {module_name}.{kind} are NaN or Inf"
                        # Named in forward order, so the last one is kept; later stages come first.
                        self.found = (order, -mpu.get_pipeline_model_parallel_rank(), said)

    def gathered(self) -> list[tuple[int, str]]:
        """Rank and sentence of every rank that found something; the one where it began first. Every rank calls this."""
        found: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, self.found)
        ranks = [(one[0], one[1], rank, one[2]) for rank, one in enumerate(found) if one is not None]
        return [(rank, said) for _, _, rank, said in sorted(ranks)]


@torch.no_grad()
def trace_last_step(job, model: Sequence[torch.nn.Module], trace: Trace) -> None:
    """The forward passes of the training step that ran last, up to the logits, once more, with ``trace`` watching both
    models.

    Args:
        job: its ``last_step`` is what runs.
        model: the student's wrapped chunks.
    """
    step = job.last_step
    if job.teacher is not None and job.config.losses.needs_teacher:
        with trace.watching(job.teacher.chunks, "the teacher", order=0):
            job.teacher.attach_outputs(step.batches, **step.shape)
            for batch in step.batches:
                if batch.teacher_output is not None:
                    batch.teacher_output.logits()
                    batch.teacher_output = None
    with trace.watching(model, "the student", order=1):
        no_loss = partial(forward_without_loss, job, ModelOutput.logits, lambda: None)
        step.run_student(forward_step_func=no_loss, forward_only=True)
