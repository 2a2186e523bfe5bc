"""The teacher: a second model beside the student on every rank, frozen, with a pipeline pass of its own.

Before the student's schedule of a step, the same microbatches go through the teacher's forward-only schedule; the last
stage keeps the logits, and the loss reads them there. Nothing of the teacher is in an optimizer, a DDP wrapper or a
checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_qad.runtime import QADError
from megatron_qad.training.batch import Batch, iterators, logits_of


class Teacher:
    """The teacher's model chunks on this rank and their forward pass.

    Args:
        chunks: frozen model chunks, one a virtual stage.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self.chunks = list(chunks)
        if any(p.requires_grad for chunk in chunks for p in chunk.parameters()):
            raise ValueError("the teacher must be frozen")

    def annotate(self, batches: Sequence[Batch], data_iterator, **schedule_arguments) -> None:
        """Run the teacher over ``batches`` and leave its logits in each, on the last stage.

        Args:
            data_iterator: the student's, for its form only.
            schedule_arguments: seq_length, micro_batch_size, decoder_seq_length, as the student's schedule gets them.
        """
        run: Callable = get_forward_backward_func()
        with torch.no_grad():
            outputs = run(
                forward_step_func=_forward_step,
                data_iterator=iterators(batches, data_iterator),
                model=self.chunks,
                num_microbatches=len(batches),
                forward_only=True,
                **schedule_arguments,
            )
        for batch, logits in zip(batches, outputs, strict=False):  # no outputs but on the last stage
            batch.teacher_logits = logits


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module):
    batch = next(batches)
    # No loss function: the schedule then hands back the outputs themselves.
    return logits_of(model, batch), None


def check_finite(logits: torch.Tensor, what: str, step: int) -> None:
    """Raise QADError, which names the ``step``, if any of the logits is NaN or Inf. Synchronizes the device."""
    if not bool(torch.isfinite(logits).all()):
        raise QADError(
            f"{what} hold NaN or Inf at step {step}; the checkpoint is damaged or overflows in {logits.dtype}. "
            "Look for NaN in its weights, or train in another precision"
        )
