"""Penalty on growing block scales: adds its gradient to the gradients of the weights, once per step.

When the schedule of a step begins, the gradient buffers are zero. Whatever is in them at the end is summed over the
data-parallel ranks and divided by the number of tokens. So each rank adds its share of the gradient, times the tokens.
"""

from collections.abc import Sequence

import torch
from megatron.core import mpu
from torch import Tensor

from megatron_qad.distillation.scale_growth import ScaleGrowth, block_amaxes, scale_growth
from megatron_qad.engine.events import Callback
from megatron_qad.formats.nvfp4_format import NVFP4
from megatron_qad.training.batch import Batch
from megatron_qad.training.loss import add_to_reports


class ScalePenalty(Callback):
    """Applies the ``scale_growth`` terms of the loss."""

    needs_initial_weights = True
    """Growth is measured relative to the weights from which training started, also after a resume."""

    def __init__(self, job):
        self._job = job
        self.terms = job.config.losses.terms_of_type(ScaleGrowth)

    def student_ready(self, student: Sequence[torch.nn.Module]) -> None:
        weights = self._job.weights
        self._linears = weights.linears
        self._initial = {
            name: block_amaxes(copy) for name, copy in weights.quantized_copies() if weights.formats[name] == NVFP4.name
        }
        self._value = torch.zeros((), device=torch.cuda.current_device())

    def student_begins(self, batches: Sequence[Batch], is_training: bool) -> None:
        if is_training:
            self.add_gradient(batches)

    def forward_ended(self, reports: list[dict[str, Tensor]], is_training: bool) -> None:
        if is_training:
            self.report(reports)

    @torch.no_grad()
    def add_gradient(self, batches: Sequence[Batch]) -> None:
        """Add the gradient of the penalty to ``main_grad`` of each weight. Collective.

        The weights must hold their quantized values.
        """
        step = self._job.loop.step
        factor = sum(term.weight.at_step(step) for term in self.terms)
        num_tokens = torch.stack([batch.loss_mask.count_nonzero() for batch in batches]).sum()
        torch.distributed.all_reduce(num_tokens, group=mpu.get_data_parallel_group(with_context_parallel=True))
        self._value.zero_()
        for name, initial in self._initial.items():
            linear, parameter = self._linears[name], self._linears[name].parameter
            is_expert = not getattr(parameter, "allreduce", True)
            group = (
                mpu.get_expert_data_parallel_group()
                if is_expert
                else mpu.get_data_parallel_group(with_context_parallel=True)
            )
            value, gradient = scale_growth(linear.part_of(parameter), initial)
            linear.part_of(parameter.main_grad).add_(gradient.mul_(factor * num_tokens / group.size()))
            if is_expert:
                # The log sums over tensor-parallel ranks and averages over data-parallel ranks. Experts are sharded
                # differently over them; this factor makes each shard count once.
                value = value * mpu.get_data_parallel_world_size(with_context_parallel=True) / group.size()
            elif not getattr(parameter, "tensor_model_parallel", False) and mpu.get_tensor_model_parallel_rank() > 0:
                value = torch.zeros_like(value)  # a replicated weight counts on the first rank only
            self._value += value

    def report(self, losses_reduced: list[dict[str, Tensor]]) -> None:
        """Add the penalty, which is not a mean over tokens, to the reports of the step's microbatches. Collective."""
        torch.distributed.all_reduce(self._value, group=mpu.get_model_parallel_group())
        step = self._job.loop.step
        for term in self.terms:
            add_to_reports(losses_reduced, term, step, [self._value * r["total loss"][1] for r in losses_reduced])
