"""Registry of the losses that ``--qad-loss`` accepts, for the parser, the run report and docs/losses.md."""

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
"""A loss of the logits, a loss of hidden states, or the penalty on the weights. Each is a frozen dataclass whose fields
are its settings."""


@dataclass(frozen=True)
class Entry:
    """One loss of the registry."""

    name: str
    """Name in ``--qad-loss``, a Python identifier. The log shows it as "<name> loss"."""
    loss: type[Loss]
    description: str
    """Short description, with which the loss's row in docs/losses.md starts."""


_ENTRIES = (
    Entry("kl", KL, "KL(teacher || student), the usual QAD loss"),
    Entry("reverse_kl", ReverseKL, "KL(student || teacher)"),
    Entry("jsd", JSD, "generalized Jensen-Shannon divergence (GKD)"),
    Entry("confidence_kl", ConfidenceKL, "KL with each token weighted by a power of the teacher's highest probability"),
    Entry("topk", TopKL, "KL over the teacher's k most likely tokens and all other tokens as one"),
    Entry("mse", MSE, "mean squared difference of the logits"),
    Entry("ce", CrossEntropy, "cross entropy against the labels (QAT), without a teacher"),
    Entry("hidden_mse", HiddenMSE, "squared error of a layer's output relative to the teacher's squared norm"),
    Entry("hidden_cosine", HiddenCosine, "cosine distance between the outputs of a layer"),
    Entry("scale_growth", ScaleGrowth, "sum over NVFP4 blocks of the squared growth of their scale"),
)
REGISTRY: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def losses_of_type(kind: type) -> dict[str, type[Loss]]:
    """Return the registered subclasses of ``kind`` (``LogitLoss``, ``HiddenLoss`` or ``ScaleGrowth``) by name."""
    return {name: entry.loss for name, entry in REGISTRY.items() if issubclass(entry.loss, kind)}


LOSSES: dict[str, type[LogitLoss]] = losses_of_type(LogitLoss)
"""The registered losses of the logits by name."""


def training_losses(scalars: Iterable[str]) -> list[str]:
    """Return the training losses among a run's TensorBoard scalars: "total loss" first, then in registry order.

    A job logs each term of its loss as "<name> loss", a second "kl" as "kl 2 loss", and a sum of several terms as
    "total loss".
    """
    order = {name: index for index, name in enumerate(("total", *REGISTRY))}
    matches = []
    for scalar in scalars:
        match = re.fullmatch(r"(\w+)(?: (\d+))? loss", scalar)
        if match and match[1] in order:
            matches.append((order[match[1]], int(match[2] or 1), scalar))
    return [scalar for _, _, scalar in sorted(matches)]


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
    """Return one loss of each token, float32 [...]. See ``vocab_parallel.logit_losses``.

    Args:
        name: a key of ``LOSSES``.
        student, teacher: logits [..., V/tp]. The backward pass overwrites the student's.
        settings: settings of the loss, such as ``temperature``.

    Raises:
        ValueError: ``name`` is unknown, or as in ``logit_losses``.

    Example::

        student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
        kl = per_token_loss("kl", student, teacher, None, VocabShard(0, 8), temperature=2.0)
        kl.shape  # torch.Size([2, 4])
    """
    losses = losses_of_type(LogitLoss)
    if name not in losses:
        raise ValueError(f"unknown loss {name!r}, expected one of {', '.join(losses)}.")
    return logit_losses([losses[name](**settings)], student, teacher, labels, shard, weight=weight)[0]
