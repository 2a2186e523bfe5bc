"""Metrics of each token of two models' vocab-parallel logits, for evaluations that look at more than means.

``metrics`` has the sums that a job's validation reports. KL and cross entropies are computed here by the same losses,
so their sums over tokens are the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.distillation.divergences import KL
from megatron_qad.distillation.other_losses import CrossEntropy
from megatron_qad.distillation.tiles import GPU_TILE_ELEMENTS, LOWEST, TILE_ELEMENTS, Tile, VocabShard, token_tiles
from megatron_qad.distillation.vocab_parallel import LogitLoss, all_gather, logit_losses

TOP_K = 5
TOKEN_METRICS = (
    *("kl_to_teacher", "cross_entropy", "teacher_cross_entropy", "entropy", "teacher_entropy"),
    *("top1_agreement", "top5_agreement"),
)
"""Names of the metrics of a token. The first five are in nats. ``top1_agreement`` is 1 if both models have the same
most likely token, else 0. ``top5_agreement`` is the share of the teacher's five most likely tokens that are among the
student's five."""

_LOWEST_LOG_P = -1e4  # e^-1e4 is 0, and 0 times it is 0, also where a logit is minus infinity


@dataclass(frozen=True)
class TokenMetrics:
    """Metrics of the tokens of a microbatch, the same on every tensor-parallel rank."""

    values: dict[str, Tensor]
    """float32 [tokens] by name, in the order of ``TOKEN_METRICS``."""
    student_top: Tensor
    """The student's most likely token, int64 [tokens]."""
    teacher_top: Tensor
    """The teacher's most likely token, int64 [tokens]."""


@torch.no_grad()
def token_metrics(student: Tensor, teacher: Tensor, labels: Tensor, shard: VocabShard) -> TokenMetrics:
    """Compute the metrics of each token. Collective over the group of ``shard``.

    Args:
        student, teacher: logits [..., V/tp]; not modified.
        labels: token ids, int64 [...].

    Example::

        logits, labels = torch.randn(2, 4, 8), torch.randint(8, (2, 4))
        metrics = token_metrics(logits, logits, labels, VocabShard(0, 8))
        metrics.values["kl_to_teacher"]  # zeros(8)
    """
    kl, cross_entropy, entropy = logit_losses([KL(), CrossEntropy(), _Entropy()], student, teacher, labels, shard)
    teacher_cross_entropy, teacher_entropy = logit_losses([CrossEntropy(), _Entropy()], teacher, None, labels, shard)
    candidates = torch.cat([_largest(logits, shard) for logits in (student, teacher)], dim=1)
    top, teacher_top = (_merge(part) for part in all_gather(candidates, shard.group).chunk(2, dim=2))
    is_token = teacher_top >= 0
    shared = (is_token[:, :, None] & (teacher_top[:, :, None] == top[:, None, :])).sum(dim=(1, 2))
    per_token = (
        *(kl, cross_entropy, teacher_cross_entropy, entropy, teacher_entropy),
        *(top[:, 0] == teacher_top[:, 0], shared / is_token.sum(dim=1)),
    )
    values = {name: value.reshape(-1).float() for name, value in zip(TOKEN_METRICS, per_token, strict=True)}
    return TokenMetrics(values, top[:, 0], teacher_top[:, 0])


class _Entropy(LogitLoss):
    """Entropy of the first model's distribution at temperature 1, in nats. It has no gradient."""

    needs_teacher = False

    def shard_stats(self, tile: Tile):
        z = tile.z_s
        if z.shape[1] == 0:
            return z.new_tensor([LOWEST, 0, 0]).expand(len(z), 3), ()
        maximum = z.amax(dim=1)
        log_p = z.sub_(maximum[:, None]).clamp_(min=_LOWEST_LOG_P)
        p = torch.exp(log_p, out=tile.scratch_a)
        return torch.stack((maximum, p.sum(dim=1), torch.linalg.vecdot(p, log_p)), dim=1), ()

    def merge(self, stats, local, rank):
        maxima, sums, moments = stats.double().unbind(dim=2)
        shift = maxima - maxima.amax(dim=0)
        mass = sums * shift.exp()
        total = mass.sum(dim=0)
        mean = (moments * shift.exp() + mass * shift).sum(dim=0) / total
        return total.log() - mean, ()


def _largest(logits: Tensor, shard: VocabShard) -> Tensor:
    """Return (value, token id) of this shard's largest logits, largest first, float64 [tokens, TOP_K, 2].

    The lowest ids win ties. Missing ones, in a shard of fewer columns, have the id -1.
    """
    flat = logits.reshape(-1, logits.shape[-1])[:, : shard.num_columns]
    found = flat.new_full((len(flat), TOP_K, 2), -torch.inf, dtype=torch.float64)  # float64 holds any token id
    found[:, :, 1] = -1
    elements = GPU_TILE_ELEMENTS if flat.device.type == "cuda" else TILE_ELEMENTS
    for rows in token_tiles(len(flat), shard.num_columns, elements):
        tile = flat[rows].float().clamp(min=LOWEST)
        for k in range(min(TOP_K, shard.num_columns)):
            value, column = tile.max(dim=1)  # the first of several; topk would return any of them
            found[rows, k, 0], found[rows, k, 1] = value.double(), (column + shard.first_column).double()
            tile.scatter_(1, column[:, None], -torch.inf)
    return found


def _merge(candidates: Tensor) -> Tensor:
    """Return the TOP_K token ids from (value, id) of each rank, [ranks, tokens, TOP_K, 2] -> int64 [tokens, TOP_K]."""
    by_token = candidates.transpose(0, 1).flatten(1, 2)  # ids ascend among equal values, as ranks do
    order = by_token[:, :, 0].sort(dim=1, descending=True, stable=True).indices[:, :TOP_K]
    return by_token[:, :, 1].gather(1, order).long()
