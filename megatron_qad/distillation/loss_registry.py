"""Every loss that ``--qad-loss`` knows, one line each; the parser, the run report and docs/losses.md read it here."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from megatron_qad.distillation.divergences import JSD, KL, ConfidenceKL, ReverseKL
from megatron_qad.distillation.hidden_states import HiddenCosine, HiddenLoss, HiddenMSE
from megatron_qad.distillation.other_losses import MSE, CrossEntropy, TopKL
from megatron_qad.distillation.scale_growth import ScaleGrowth
from megatron_qad.distillation.tiles import VocabShard
from megatron_qad.distillation.vocab_parallel import LogitLoss, logit_losses

Loss = LogitLoss | HiddenLoss | ScaleGrowth
"""A loss of the logits, a loss of hidden states, or the penalty on the weights. All are frozen dataclasses, whose
fields are the loss's settings."""


@dataclass(frozen=True)
class Entry:
    """One loss of the registry."""

    name: str
    """In ``--qad-loss`` and, followed by " loss", in the log; a Python identifier."""
    loss: type[Loss]
    description: str
    """One sentence for docs/losses.md."""


_ENTRIES = (
    Entry("kl", KL, "KL(teacher || student): what QAD trains with"),
    Entry("reverse_kl", ReverseKL, "KL(student || teacher)"),
    Entry("jsd", JSD, "generalized Jensen-Shannon divergence (GKD)"),
    Entry("confidence_kl", ConfidenceKL, "KL, each token times the teacher's highest probability to that power"),
    Entry("topk", TopKL, "KL over the teacher's k most likely tokens and all others as one"),
    Entry("mse", MSE, "mean squared difference of logits"),
    Entry("ce", CrossEntropy, "cross entropy against the labels: QAT; needs no teacher"),
    Entry("hidden_mse", HiddenMSE, "squared difference of a layer's output as a share of the teacher's square"),
    Entry("hidden_cosine", HiddenCosine, "1 - cosine between a layer's outputs"),
    Entry("scale_growth", ScaleGrowth, "sum over NVFP4 blocks of the squared growth of their scale"),
)
REGISTRY: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def losses_of_kind(kind: type) -> dict[str, type[Loss]]:
    """The registered subclasses of ``kind`` (``LogitLoss``, ``HiddenLoss`` or ``ScaleGrowth``) by name."""
    return {name: entry.loss for name, entry in REGISTRY.items() if issubclass(entry.loss, kind)}


LOSSES: dict[str, type[LogitLoss]] = losses_of_kind(LogitLoss)
"""The losses of the logits."""


def training_losses(scalars: Iterable[str]) -> list[str]:
    """Which of a run's TensorBoard scalars are training losses: "total loss" first, then in the registry's order.

    A job logs each part of its loss as "<name> loss", the second "kl" as "kl 2 loss", and a sum of several parts as
    "total loss".
    """
    order = {name: place for place, name in enumerate(("total", *REGISTRY))}
    found = []
    for scalar in scalars:
        match = re.fullmatch(r"(\w+)(?: (\d+))? loss", scalar)
        if match and match[1] in order:
            found.append((order[match[1]], int(match[2] or 1), scalar))
    return [scalar for _, _, scalar in sorted(found)]


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
        name: a loss of the logits. student, teacher: logits [..., V/tp]; the backward pass consumes the student's.
        settings: of the loss, such as ``temperature``.
    """
    losses = losses_of_kind(LogitLoss)
    if name not in losses:
        raise ValueError(f"unknown loss {name!r}; one of {', '.join(losses)}")
    return logit_losses([losses[name](**settings)], student, teacher, labels, shard, weight=weight)[0]
