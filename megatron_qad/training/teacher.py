"""The teacher: a second, frozen model on every rank, with its own forward-only pipeline schedule.

Before the student's schedule of a step, the teacher runs on the same microbatches. The last stage stores the logits or
the final hidden states, which the loss reads there. The teacher may differ from the student in layers, stages, widths
and microbatch size. Its parameters are not part of any optimizer, DDP wrapper or checkpoint.
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
        chunks: frozen model chunks, one per virtual stage of the teacher (which may have fewer than the student).
        forward: runs a model on a microbatch.
        joined: number of the student's microbatches in one microbatch of the teacher.
        keeps_hidden: store final hidden states in the batches instead of logits.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], forward: ForwardPass, joined: int = 1, keeps_hidden: bool = False
    ):
        self.chunks, self.joined, self.keeps_hidden = list(chunks), joined, keeps_hidden
        self._forward = forward
        if any(p.requires_grad for chunk in chunks for p in chunk.parameters()):
            raise ValueError("the teacher must be frozen")

    def attach_outputs(self, batches: Sequence[Batch], *, seq_length: int, micro_batch_size: int, **kwargs) -> None:
        """Run the teacher on ``batches`` and store its output in each of them, on the last stage.

        Args:
            seq_length, micro_batch_size, kwargs: arguments of the student's schedule.
        """
        joined = self.joined if self._can_join(len(batches)) else 1
        groups = [join(batches[i : i + joined]) for i in range(0, len(batches), joined)]
        is_packed = batches[0].documents is not None
        with torch.no_grad():
            outputs = self.forward(
                groups,
                seq_length=seq_length * joined if is_packed else seq_length,
                micro_batch_size=micro_batch_size if is_packed else micro_batch_size * joined,
                **kwargs,
            )
        remaining = iter(batches)
        last_chunk = unwrap_model(self.chunks[-1]) if self.keeps_hidden else None
        outputs.reverse()
        while outputs:  # only the last stage has outputs
            for tensor in self._split(outputs.pop(), joined, is_packed, self.keeps_hidden):
                next(remaining).teacher_output = ModelOutput(tensor, last_chunk)
        for i, group in enumerate(groups if joined > 1 else ()):
            for key, state in group.teacher_states.items():
                parts = self._split(state, joined, is_packed, is_hidden=True)
                for batch, part in zip(batches[i * joined : (i + 1) * joined], parts, strict=True):
                    batch.teacher_states[key] = part

    def _can_join(self, num_batches: int) -> bool:
        """Whether the number of microbatches allows joining them; it was checked for training steps only.

        Evaluations and ramped-up batches may have other numbers. Virtual stages need a multiple of the pipeline size.
        """
        rounds = mpu.get_pipeline_model_parallel_world_size() if len(self.chunks) > 1 else 1
        return num_batches % (self.joined * rounds) == 0

    def forward(self, batches: Sequence[Batch], **shape) -> list[torch.Tensor]:
        """Return the outputs of all microbatches in order on the last stage, and an empty list on the others."""
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
        # Without a loss function, the schedule returns the outputs themselves.
        return self._forward(model, next(batches), hidden=self.keeps_hidden), None

    def _split(self, output: torch.Tensor, joined: int, is_packed: bool, is_hidden: bool) -> list[torch.Tensor]:
        """Split an output into those of the joined microbatches. Returns copies, which can be freed one by one."""
        if joined == 1:
            return [output]
        sequence_dim = 0 if is_hidden else 1
        dim = sequence_dim if is_packed else 1 - sequence_dim
        if is_packed and is_hidden and get_model_config(self.chunks[-1]).sequence_parallel:
            # Each rank has a shard of the joined row, and needs a shard of each of the rows in it.
            gathered = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
            return [scatter_to_sequence_parallel_region(part).clone() for part in gathered.chunk(joined, dim=dim)]
        return [part.clone() for part in output.chunk(joined, dim=dim)]
