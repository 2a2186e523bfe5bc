"""The teacher: a second model beside the student on every rank, frozen, with a pipeline pass of its own.

Before the student's schedule of a step, the same microbatches go through the teacher's forward-only schedule; the last
stage keeps the logits, and the loss reads them there. The schedule is the teacher's own: it may have other layers,
stages, widths and larger microbatches than the student's. Nothing of the teacher is in an optimizer, a DDP wrapper or a
checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_qad.runtime import QADError
from megatron_qad.training.batch import Batch, join, logits_of


class Teacher:
    """The teacher's model chunks on this rank and their forward pass.

    Args:
        chunks: frozen model chunks, one a virtual stage; as many as the teacher's pattern has, not the student's.
        joined: how many of the student's microbatches the teacher takes at a time.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], joined: int = 1):
        self.chunks, self.joined = list(chunks), joined
        if any(p.requires_grad for chunk in chunks for p in chunk.parameters()):
            raise ValueError("the teacher must be frozen")

    def annotate(self, batches: Sequence[Batch], *, seq_length: int, micro_batch_size: int, **rest) -> None:
        """Run the teacher over ``batches`` and leave its logits in each, on the last stage.

        Args:
            seq_length, micro_batch_size, rest: as the student's schedule gets them.
        """
        # An evaluation may have another number of microbatches than a step.
        joined = self.joined if len(batches) % self.joined == 0 else 1
        groups = [join(batches[i : i + joined]) for i in range(0, len(batches), joined)]
        is_packed = batches[0].documents is not None
        with torch.no_grad():
            outputs = self.forward(
                groups,
                seq_length=seq_length * joined if is_packed else seq_length,
                micro_batch_size=micro_batch_size if is_packed else micro_batch_size * joined,
                **rest,
            )
        remaining = iter(batches)
        outputs.reverse()
        while outputs:  # none but on the last stage
            for logits in split(outputs.pop(), joined, is_packed):
                next(remaining).teacher_logits = logits

    def forward(self, batches: Sequence[Batch], **shape) -> list[torch.Tensor]:
        """The logits of all microbatches, in order, on the last stage; an empty list on the others."""
        virtual = len(self.chunks) if len(self.chunks) > 1 else None
        run: Callable = get_forward_backward_func(mpu.get_pipeline_model_parallel_world_size(), virtual)
        return run(
            forward_step_func=_forward_step,
            data_iterator=[iter(batches) for _ in self.chunks] if virtual else iter(batches),
            model=self.chunks,
            num_microbatches=len(batches),
            forward_only=True,
            **shape,
        )


def split(logits: torch.Tensor, joined: int, is_packed: bool) -> list[torch.Tensor]:
    """The logits of each of the microbatches that were joined. Copies, so that each can be freed by itself."""
    if joined == 1:
        return [logits]
    return [part.clone() for part in logits.chunk(joined, dim=1 if is_packed else 0)]


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
