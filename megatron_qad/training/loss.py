"""The loss of a microbatch on the last pipeline stage, and its metrics in an evaluation."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_qad.distillation import LogitLoss, Metrics, Term, VocabShard, WeightedLosses, compare, logit_losses
from megatron_qad.distillation.fused_linear import fused_linear_losses, tokens_per_chunk
from megatron_qad.models.output_layer import ModelOutput
from megatron_qad.training.batch import Batch


class Loss:
    """Computes the losses of logits of one job, and accumulates the metrics of the current evaluation.

    Args:
        losses: all losses of the job. Callbacks add the losses of other kinds to the reports later.
        vocab_size: vocabulary size without padding.
        is_fused: the student returns final hidden states; the output layer is applied here, fused with the loss.
    """

    def __init__(self, losses: WeightedLosses, vocab_size: int, is_fused: bool):
        self._terms = losses.terms_of_type(LogitLoss)
        self._has_several = len(losses.terms) > 1
        self._vocab_size, self._is_fused = vocab_size, is_fused
        self._metrics: Metrics | None = None
        self._after_image: Metrics | None = None
        self._microbatch_kl: list[Tensor] = []
        self.microbatch_kl: Tensor | None = None
        """(sum of the KL, number of tokens) of each microbatch that the last ``take_metrics`` counted, float64
        [n, 2]."""

    def begin_step(self, step: int) -> None:
        """Set the weights of the loss terms to those of ``step``, counted from 1."""
        self._weights = [term.weight.at_step(step) for term in self._terms]

    def __call__(self, batch: Batch, model: torch.nn.Module, output: Tensor) -> tuple[Tensor, Tensor, dict]:
        """Compute the loss of one microbatch.

        Args:
            batch: the microbatch, with ``teacher_output`` set if there is a teacher.
            model: the last stage of the student.
            output: output of the student, logits [b, s, V/tp] or final hidden states. The backward pass overwrites
                logits.

        Returns:
            The sum of the loss over counted tokens, the number of these tokens, and the loss report: (sum, count) of
            each unweighted loss term by name, and of the "total loss" if there are several terms. An evaluation returns
            an empty report, because Megatron would print exponentials of its entries as perplexities; ``take_metrics``
            returns its metrics.
        """
        student = ModelOutput(output, unwrap_model(model) if self._is_fused else None)
        shard = VocabShard.for_rank(student.width, self._vocab_size, mpu.get_tensor_model_parallel_group())
        teacher, batch.teacher_output = batch.teacher_output, None  # frees the output after this microbatch
        num_tokens = batch.loss_mask.count_nonzero().int()
        if not torch.is_grad_enabled():
            self._add(compute_metrics(student, teacher, batch.labels, batch.loss_mask, shard))
            if batch.after_image is not None:
                weight = batch.loss_mask * batch.after_image
                self._add_after_image(compute_metrics(student, teacher, batch.labels, weight, shard))
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
        self._microbatch_kl.append(torch.stack((metrics.sums[0], metrics.num_tokens)))

    def _add_after_image(self, metrics: Metrics) -> None:
        if self._after_image is None:
            self._after_image = Metrics.zero(metrics.sums.device)
        self._after_image += metrics

    def take_metrics_after_image(self) -> Metrics:
        """Return the sums since the last call over the tokens in whose document an image comes before them."""
        total, self._after_image = self._after_image, None
        return total or Metrics.zero(torch.cuda.current_device())

    def take_metrics(self) -> Metrics:
        """Return this rank's metric sums since the last call; zeros on ranks that compute no loss."""
        total, self._metrics = self._metrics, None
        device = torch.cuda.current_device()
        empty = torch.zeros(0, 2, dtype=torch.float64, device=device)
        self.microbatch_kl = torch.stack(self._microbatch_kl) if self._microbatch_kl else empty
        self._microbatch_kl = []
        return total or Metrics.zero(device)


def add_to_reports(reports: list[dict[str, Tensor]], term: Term, step: int, values: Sequence[Tensor]) -> None:
    """Add a loss term to the report of each microbatch, as (sum, token count), and to its "total loss"."""
    for report, value in zip(reports, values, strict=False):  # only the last stage has reports
        report[f"{term.name} loss"] = torch.stack((value, report["total loss"][1]))
        report["total loss"][0] += term.weight.at_step(step) * value


def compute_losses(
    losses, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor, shard: VocabShard, weight: Tensor
) -> tuple[Tensor, ...]:
    """Compute ``logit_losses`` of two outputs, fused with the output layers if the student returns hidden states."""
    if student.model is None:
        teacher_logits = None if teacher is None else teacher.logits()
        return logit_losses(losses, student.tensor, teacher_logits, labels, shard, weight=weight)
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
    """Compute ``compare`` of two outputs, in chunks of tokens if the student returns hidden states."""
    total = Metrics.zero(weight.device)
    for rows, student_logits, teacher_logits in logits_in_chunks(student, teacher):
        part = compare(student_logits, teacher_logits, labels.flatten()[rows], weight.flatten()[rows], shard)
        total += part
    return total


def logits_in_chunks(
    student: ModelOutput, teacher: ModelOutput | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield the logits of both outputs, [tokens, V/tp], and the tokens of which they are: all, or in chunks if the
    student returns hidden states."""
    if student.model is None:
        teacher_logits = None if teacher is None else teacher.logits().flatten(0, 1)
        yield slice(None), student.tensor.flatten(0, 1), teacher_logits
        return
    hidden = student.hidden().flatten(0, 1)
    teacher_hidden = None if teacher is None else teacher.hidden().flatten(0, 1)
    step = tokens_per_chunk(len(student.weight), student.weight.element_size(), hidden.device.type)
    for start in range(0, len(hidden), step):
        rows = slice(start, start + step)
        teacher_logits = None if teacher_hidden is None else teacher_hidden[rows] @ teacher.weight.t()
        yield rows, hidden[rows] @ student.weight.t(), teacher_logits
