"""The teacher: a second model beside the student on every rank, frozen, with a pipeline pass of its own.

Before the student's schedule of a step, the same microbatches go through the teacher's forward-only schedule; the last
stage keeps the logits or the final hidden states, and the loss reads them there. The schedule is the teacher's own: it
may have other layers, stages, widths and larger microbatches than the student's. Nothing of the teacher is in an
optimizer, a DDP wrapper or a checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.utils import get_model_config, unwrap_model

from megatron_qad.models.output_layer import ModelOutput
from megatron_qad.training.batch import Batch, ForwardPass, join


class Teacher:
    """The teacher's model chunks on this rank and their forward pass.

    Args:
        chunks: frozen model chunks, one a virtual stage; as many as the teacher's pattern has, not the student's.
        forward: runs a microbatch through a model.
        joined: how many of the student's microbatches the teacher takes at a time.
        keeps_hidden: leave final hidden states in the batches instead of logits.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], forward: ForwardPass, joined: int = 1, keeps_hidden: bool = False
    ):
        self.chunks, self.joined, self.keeps_hidden = list(chunks), joined, keeps_hidden
        self._forward = forward
        if any(p.requires_grad for chunk in chunks for p in chunk.parameters()):
            raise ValueError("the teacher must be frozen")

    def attach_outputs(self, batches: Sequence[Batch], *, seq_length: int, micro_batch_size: int, **rest) -> None:
        """Run the teacher over ``batches`` and leave its output in each, on the last stage.

        Args:
            seq_length, micro_batch_size, rest: as the student's schedule gets them.
        """
        joined = self.joined if self._can_join(len(batches)) else 1
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
        head = unwrap_model(self.chunks[-1]) if self.keeps_hidden else None
        outputs.reverse()
        while outputs:  # none but on the last stage
            for tensor in self._split(outputs.pop(), joined, is_packed, self.keeps_hidden):
                next(remaining).teacher_output = ModelOutput(tensor, head)
        for i, group in enumerate(groups if joined > 1 else ()):
            for key, state in group.teacher_states.items():
                parts = self._split(state, joined, is_packed, is_hidden=True)
                for batch, part in zip(batches[i * joined : (i + 1) * joined], parts, strict=True):
                    batch.teacher_states[key] = part

    def _can_join(self, num_batches: int) -> bool:
        """An evaluation, or a batch that grows, may have another number of microbatches than a step was checked for;
        virtual stages take whole rounds of the pipeline."""
        rounds = mpu.get_pipeline_model_parallel_world_size() if len(self.chunks) > 1 else 1
        return num_batches % (self.joined * rounds) == 0

    def forward(self, batches: Sequence[Batch], **shape) -> list[torch.Tensor]:
        """The outputs of all microbatches, in order, on the last stage; an empty list on the others."""
        virtual = len(self.chunks) if len(self.chunks) > 1 else None
        run: Callable = get_forward_backward_func(mpu.get_pipeline_model_parallel_world_size(), virtual)
        return run(
            forward_step_func=self._forward_step,
            data_iterator=[iter(batches) for _ in self.chunks] if virtual else iter(batches),
            model=self.chunks,
            num_microbatches=len(batches),
            forward_only=True,
            **shape,
        )

    def _forward_step(self, batches: Iterator[Batch], model: torch.nn.Module):
        # No loss function: the schedule then hands back the outputs themselves.
        return self._forward(model, next(batches), hidden=self.keeps_hidden), None

    def _split(self, output: torch.Tensor, joined: int, is_packed: bool, is_hidden: bool) -> list[torch.Tensor]:
        """The outputs of each of the microbatches that were joined. Copies, so that each can be freed by itself."""
        if joined == 1:
            return [output]
        sequence_dim = 0 if is_hidden else 1
        dim = sequence_dim if is_packed else 1 - sequence_dim
        if is_packed and is_hidden and get_model_config(self.chunks[-1]).sequence_parallel:
            # Each rank has a part of the joined row, and shall have that part of each of its rows.
            whole = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
            return [scatter_to_sequence_parallel_region(part).clone() for part in whole.chunk(joined, dim=dim)]
        return [part.clone() for part in output.chunk(joined, dim=dim)]
