"""Validation metrics of a student compared with its teacher, as sums over tokens that are divided once at the end."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.distillation.divergences import KL
from megatron_qad.distillation.other_losses import CrossEntropy
from megatron_qad.distillation.tiles import VocabShard
from megatron_qad.distillation.vocab_parallel import all_gather, logit_losses

NAMES = ("kl_to_teacher", "cross_entropy", "teacher_cross_entropy", "top1_agreement")
"""Names of the metrics. KL(teacher || student) and the cross entropies are in nats per token; top-1 agreement is the
fraction of tokens for which both models have the same most likely token."""


@dataclass
class Metrics:
    """Sums of metrics over tokens. Add microbatches with ``+=``, then call ``all_reduce`` and ``means``."""

    sums: Tensor
    """Sums in the order of ``NAMES``, float64 [len(NAMES)]."""
    num_tokens: Tensor
    """Sum of the token weights, float64 []."""

    @classmethod
    def zero(cls, device=None) -> "Metrics":
        return cls(
            torch.zeros(len(NAMES), dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.float64, device=device),
        )

    def __iadd__(self, other: "Metrics") -> "Metrics":
        self.sums += other.sums
        self.num_tokens += other.num_tokens
        return self

    def __sub__(self, other: "Metrics") -> "Metrics":
        return Metrics(self.sums - other.sums, self.num_tokens - other.num_tokens)

    def all_reduce(self, group) -> "Metrics":
        packed = torch.cat((self.sums, self.num_tokens.view(1)))
        torch.distributed.all_reduce(packed, group=group)
        return Metrics(packed[:-1], packed[-1])

    def means(self, *, has_teacher: bool = True) -> dict[str, float]:
        """Return the means per token, and ``num_tokens``. Means are NaN if there is no token.

        Without a teacher, only the student's cross entropy is returned.
        """
        values = dict(zip(NAMES, (self.sums / self.num_tokens).tolist(), strict=True))
        if not has_teacher:
            values = {"cross_entropy": values["cross_entropy"]}
        return {**values, "num_tokens": int(self.num_tokens.item())}


@torch.no_grad()
def compare(student: Tensor, teacher: Tensor | None, labels: Tensor, loss_mask: Tensor, shard: VocabShard) -> Metrics:
    """Compute the metrics of one microbatch.

    Args:
        student, teacher: logits [..., V/tp]; not modified. If ``teacher`` is None, its metrics are zero.
        labels: token ids, int64 [...].
        loss_mask: weight of each token, float [...]; 0 leaves the token out.

    Example::

        logits, labels = torch.randn(2, 4, 8), torch.randint(8, (2, 4))
        metrics = compare(logits, logits, labels, torch.ones(2, 4), VocabShard(0, 8)).means()
        metrics["top1_agreement"]  # 1.0
    """
    weight = loss_mask.reshape(-1).double()
    per_token = [torch.zeros_like(weight)] * len(NAMES)
    if teacher is None:
        (per_token[1],) = logit_losses([CrossEntropy()], student, None, labels, shard, weight=loss_mask)
    else:
        losses = [KL(), CrossEntropy()]
        per_token[0], per_token[1] = logit_losses(losses, student, teacher, labels, shard, weight=loss_mask)
        (per_token[2],) = logit_losses([CrossEntropy()], teacher, None, labels, shard, weight=loss_mask)
        agreement = _most_likely_token(student, shard) == _most_likely_token(teacher, shard)
        per_token[3] = agreement.double() * weight
    sums = torch.stack([value.double().sum() for value in per_token])
    return Metrics(sums, weight.sum())


def _most_likely_token(logits: Tensor, shard: VocabShard) -> Tensor:
    """Return the most likely token ids over the full vocabulary, [tokens]. The lowest id wins a tie."""
    flat = logits.reshape(-1, logits.shape[-1])[:, : shard.num_columns]
    if shard.num_columns:
        value, index = flat.max(dim=1)
    else:
        value = index = flat.new_full((flat.shape[0],), torch.finfo(flat.dtype).min)
    best = torch.stack((value.double(), index.double() + shard.first_column), dim=1)  # float64 holds any token id
    candidates = all_gather(best, shard.group)  # [ranks, tokens, 2]
    winner = candidates[:, :, 0].argmax(dim=0, keepdim=True)
    return candidates[:, :, 1].gather(0, winner)[0].long()
