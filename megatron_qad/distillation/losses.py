"""The losses by name, on one interface: logits of both models in, one number a token out."""

from torch import Tensor

from megatron_qad.distillation.divergences import JSD, KL, ConfidenceKL, ReverseKL
from megatron_qad.distillation.other_losses import MSE, CrossEntropy, TopKL
from megatron_qad.distillation.tiles import VocabShard
from megatron_qad.distillation.vocab_parallel import LogitLoss, logit_losses

LOSSES: dict[str, type[LogitLoss]] = {
    "kl": KL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "confidence_kl": ConfidenceKL,
    "topk": TopKL,
    "mse": MSE,
    "ce": CrossEntropy,
}
"""kl: KL(teacher || student), what QAD trains with. ce: cross entropy against the labels, which is QAT."""


def per_token_loss(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    shard: VocabShard,
    *,
    weight: Tensor | None = None,
    **settings,
) -> Tensor:
    """One loss of each token, float32 [...]; see ``vocab_parallel.logit_losses``.

    Args:
        name: one of ``LOSSES``. student, teacher: logits [..., V/tp]; the backward pass consumes the student's.
        settings: of the loss, such as ``temperature``.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; one of {', '.join(LOSSES)}")
    return logit_losses([LOSSES[name](**settings)], student, teacher, labels, shard, weight=weight)[0]
