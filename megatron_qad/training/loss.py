"""forward_step and its loss function: what Megatron's schedule calls for every microbatch of the student."""

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from megatron_qad.distillation import LogitLoss, Metrics, VocabShard, WeightedLosses, parse_loss
from megatron_qad.engine.heartbeat import heartbeat
from megatron_qad.models.families import text_config
from megatron_qad.models.output_layer import Output
from megatron_qad.training.batch import Batch, output_of
from megatron_qad.training.outputs import Outputs, losses_of, metrics_of


def forward_step(batches: Iterator[Batch], model: torch.nn.Module):
    """One microbatch through the student. Returns its output and the function that turns that into a loss."""
    heartbeat.still()
    batch = next(batches)
    fused = Outputs.chosen(get_args().qad).fused
    return output_of(model, batch, hidden=fused), partial(loss_function, batch, unwrap_model(model) if fused else None)


def loss_function(batch: Batch, head: torch.nn.Module | None, output: torch.Tensor):
    """The loss of one microbatch, on the last stage.

    Args:
        batch: with ``teacher_output`` filled, where there is a teacher.
        head: the student's last stage, if its output layer is still to be applied.
        output: the student's, logits [b, s, V/tp] or the final hidden states; the backward pass consumes logits.

    Returns:
        sum of the loss over counted tokens, their number, and the report: sum and count of each part of the loss,
        unweighted, by its name, and of the "total loss" where there are several. In evaluation the metrics go to
        ``validation_metrics`` instead, because Megatron would print each report's exponential as a perplexity.
    """
    args = get_args()
    student = Output(output, head)
    shard = VocabShard.of_rank(
        student.width, text_config(args.hf_config)["vocab_size"], mpu.get_tensor_model_parallel_group()
    )
    teacher, batch.teacher_output = batch.teacher_output, None  # freed as soon as this microbatch is done
    num_tokens = batch.loss_mask.count_nonzero().int()
    if not torch.is_grad_enabled():
        validation_metrics.add(metrics_of(student, teacher, batch.labels, batch.loss_mask, shard))
        return output.new_zeros(()), num_tokens, {}
    step = args.curr_iteration + 1  # Megatron counts a step when it is done
    parts = job_losses()
    terms = parts.of_kind(LogitLoss)
    losses = losses_of([term.loss for term in terms], student, teacher, batch.labels, shard, batch.loss_mask)
    sums = {term.name: loss.sum() for term, loss in zip(terms, losses, strict=True)}
    total = sum(term.weight.at(step) * sums[term.name] for term in terms)
    reported = sums | ({"total": total} if len(parts.terms) > 1 else {})  # parts of other kinds are added to it later
    report = {f"{name} loss": torch.stack((v.detach(), num_tokens.float())) for name, v in reported.items()}
    return total, num_tokens, report


def job_losses() -> WeightedLosses:
    """``--qad-loss`` of the running job."""
    options = get_args().qad
    return _parsed(options.qad_loss, options.qad_temperature)


@lru_cache(maxsize=1)
def _parsed(text: str, temperature: float) -> WeightedLosses:
    return parse_loss(text, temperature=temperature)


class _ValidationMetrics:
    """Metrics of the evaluation that is running, on this rank."""

    def __init__(self):
        self._total: Metrics | None = None

    def add(self, metrics: Metrics) -> None:
        if self._total is None:
            self._total = Metrics.zero(metrics.sums.device)
        self._total += metrics

    def take(self) -> Metrics:
        """The sums since the last call; zeros on ranks that compute no loss."""
        total, self._total = self._total, None
        return total or Metrics.zero(torch.cuda.current_device())


validation_metrics = _ValidationMetrics()
