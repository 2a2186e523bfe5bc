"""The loss of a microbatch on the last stage, and in evaluation its metrics."""

from collections.abc import Sequence

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_qad.distillation import LogitLoss, Metrics, Term, VocabShard, WeightedLosses, compare, logit_losses
from megatron_qad.distillation.fused_linear import fused_linear_losses, tokens_per_chunk
from megatron_qad.models.output_layer import ModelOutput
from megatron_qad.training.batch import Batch


class Loss:
    """The loss of the logits of one job, and the metrics of the evaluation that is running.

    Args:
        losses: of the job; those of other kinds are added to its reports later, by callbacks.
        vocab_size: without padding.
        is_fused: the student returns final hidden states, to which the output layer is still to be applied.
    """

    def __init__(self, losses: WeightedLosses, vocab_size: int, is_fused: bool):
        self._terms = losses.terms_of_type(LogitLoss)
        self._has_several = len(losses.terms) > 1
        self._vocab_size, self._is_fused = vocab_size, is_fused
        self._metrics: Metrics | None = None

    def begin_step(self, step: int) -> None:
        """The weights of the terms are those of ``step``, counted from 1."""
        self._weights = [term.weight.at_step(step) for term in self._terms]

    def __call__(self, batch: Batch, model: torch.nn.Module, output: Tensor) -> tuple[Tensor, Tensor, dict]:
        """The loss of one microbatch.

        Args:
            batch: with ``teacher_output`` filled, where there is a teacher.
            model: the student's last stage.
            output: the student's, logits [b, s, V/tp] or the final hidden states; the backward pass consumes logits.

        Returns:
            sum of the loss over counted tokens, their number, and the report: sum and count of each part of the loss,
            unweighted, by its name, and of the "total loss" where there are several. In evaluation the metrics are
            kept for ``take_metrics`` instead, because Megatron would print each report's exponential as a perplexity.
        """
        student = ModelOutput(output, unwrap_model(model) if self._is_fused else None)
        shard = VocabShard.for_rank(student.width, self._vocab_size, mpu.get_tensor_model_parallel_group())
        teacher, batch.teacher_output = batch.teacher_output, None  # freed as soon as this microbatch is done
        num_tokens = batch.loss_mask.count_nonzero().int()
        if not torch.is_grad_enabled():
            self._add(compute_metrics(student, teacher, batch.labels, batch.loss_mask, shard))
            return output.new_zeros(()), num_tokens, {}
        losses = [term.loss for term in self._terms]
        values = compute_losses(losses, student, teacher, batch.labels, shard, batch.loss_mask)
        sums = {term.name: value.sum() for term, value in zip(self._terms, values, strict=True)}
        total = sum(weight * value for weight, value in zip(self._weights, sums.values(), strict=True))
        reported = sums | ({"total": total} if self._has_several else {})
        report = {f"{name} loss": torch.stack((v.detach(), num_tokens.float())) for name, v in reported.items()}
        return total, num_tokens, report

    def _add(self, metrics: Metrics) -> None:
        if self._metrics is None:
            self._metrics = Metrics.zero(metrics.sums.device)
        self._metrics += metrics

    def take_metrics(self) -> Metrics:
        """The sums of this rank's evaluation since the last call; zeros on ranks that compute no loss."""
        total, self._metrics = self._metrics, None
        return total or Metrics.zero(torch.cuda.current_device())


def add_to_reports(reports: list[dict[str, Tensor]], term: Term, step: int, values: Sequence[Tensor]) -> None:
    """One more part of the loss in each microbatch's report, (sum, tokens); and in its "total loss"."""
    for report, value in zip(reports, values, strict=False):  # no reports but on the last stage
        report[f"{term.name} loss"] = torch.stack((value, report["total loss"][1]))
        report["total loss"][0] += term.weight.at_step(step) * value


def compute_losses(
    losses, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, shard: VocabShard, weight: Tensor
) -> tuple[Tensor, ...]:
    """``logit_losses`` of two outputs, fused with the output layers if the student's are hidden states."""
    if student.model is None:
        of_teacher = None if teacher is None else teacher.logits()
        return logit_losses(losses, student.tensor, of_teacher, labels, shard, weight=weight)
    return fused_linear_losses(
        losses,
        student.hidden(),
        student.weight,
        *((None, None) if teacher is None else (teacher.hidden(), teacher.weight)),
        labels,
        shard,
        token_weight=weight,
        reduce_hidden_grad=not student.sums_hidden_grad,
    )


@torch.no_grad()
def compute_metrics(
    student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, weight: Tensor, shard: VocabShard
) -> Metrics:
    """``compare`` of two outputs; in chunks of tokens if the student's are hidden states."""
    if student.model is None:
        return compare(student.tensor, None if teacher is None else teacher.logits(), labels, weight, shard)
    total = Metrics.zero(weight.device)
    hidden = student.hidden().flatten(0, 1)
    of_teacher = None if teacher is None else teacher.hidden().flatten(0, 1)
    labels, weight = labels.flatten(), weight.flatten()
    step = tokens_per_chunk(len(student.weight), student.weight.element_size(), weight.device.type)
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        logits = None if of_teacher is None else of_teacher[rows] @ teacher.weight.t()
        total += compare(hidden[rows] @ student.weight.t(), logits, labels[rows], weight[rows], shard)
    return total
