"""Logit losses other than full-distribution divergences: cross entropy, mean squared error, top-k KL."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_qad.distillation.tiles import LOWEST, Tile
from megatron_qad.distillation.vocab_parallel import LogitLoss
from megatron_qad.engine.errors import QADError


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(LogitLoss):
    """Cross entropy against the labels at temperature 1 (QAT). Needs no teacher."""

    temperature: float = field(default=1.0, init=False)
    teacher_temperature: float = field(default=1.0, init=False)

    needs_teacher = False
    needs_labels = True

    def shard_stats(self, tile: Tile):
        z, num_columns = tile.z_s, tile.z_s.shape[1]
        if num_columns == 0:
            return z.new_tensor([LOWEST, 0, 0]).expand(len(z), 3), (tile.column,)
        here = (tile.column >= 0) & (tile.column < num_columns)
        label = z.gather(1, tile.column.clamp(0, num_columns - 1)[:, None])[:, 0]
        maximum = z.amax(dim=1)
        total = z.sub_(maximum[:, None]).exp_().sum(dim=1)
        return torch.stack((maximum, total, torch.where(here, label, 0.0)), dim=1), (tile.column,)

    def merge(self, stats, local, rank):
        maxima, sums, labels = stats.double().unbind(dim=2)
        top = maxima.amax(dim=0)
        log_total = (sums * (maxima - top).exp()).sum(dim=0).log()
        return top - labels.sum(dim=0) + log_total, ((top + log_total).float(), *local)

    def gradient(self, tile: Tile, saved, factor):
        log_z, column = saved
        p = tile.z_s.sub_(log_z[:, None]).exp_()
        num_columns = p.shape[1]
        if num_columns:
            here = (column >= 0) & (column < num_columns)
            p.scatter_add_(1, column.clamp(0, num_columns - 1)[:, None], -here[:, None].float())
        return p.mul_(factor[:, None])


@dataclass(frozen=True, kw_only=True)
class MSE(LogitLoss):
    """Mean of (z_s - z_t)^2 over the unpadded vocabulary. It uses the raw logits, without a temperature.

    Args:
        centred: subtract each model's mean logit first. This changes no distribution, and a constant offset between the
            models then costs nothing.
    """

    centred: bool = True
    temperature: float = field(default=1.0, init=False)
    teacher_temperature: float = field(default=1.0, init=False)

    def shard_stats(self, tile: Tile):
        difference = tile.z_s.sub_(tile.z_t)
        num_columns = difference.shape[1]
        mean = difference.sum(dim=1) / max(num_columns, 1)
        squares = difference.sub_(mean[:, None]).square_().sum(dim=1)
        return torch.stack((torch.full_like(mean, num_columns), mean, squares), dim=1), ()

    def merge(self, stats, local, rank):
        counts, means, squares = stats.double().unbind(dim=2)
        total = counts.sum(dim=0)
        mean = (counts * means).sum(dim=0) / total
        loss = (squares + counts * (means - mean).square()).sum(dim=0) / total
        if not self.centred:
            loss, mean = loss + mean.square(), torch.zeros_like(mean)
        return loss, (mean.float(), (2 / total).float())

    def gradient(self, tile: Tile, saved, factor):
        mean, two_over_count = saved
        return tile.z_s.sub_(tile.z_t).sub_(mean[:, None]).mul_((two_over_count * factor)[:, None])


@dataclass(frozen=True, kw_only=True)
class TopKL(LogitLoss):
    """KL(teacher || student) over k + 1 outcomes: the teacher's top-k tokens and all other tokens as one.

    The top k are those of the full vocabulary. Each rank sends its own top-k logits, 2 k + 4 values per token.

    Args:
        k: number of tokens; at most V/tp, because one rank may hold all of them.
    """

    k: int = 64

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.k, int) and self.k > 0):
            raise ValueError(f"topk(k={self.k}): expected a positive integer")

    def check(self, width: int) -> None:
        if self.k > width:
            raise QADError(
                f"topk(k={self.k}): k must not exceed the {width} columns of one rank's shard, because each rank "
                f"gathers its own top-k tokens. Choose k <= {width} or fewer tensor-parallel ranks."
            )

    def shard_stats(self, tile: Tile):
        z_s, z_t = tile.z_s, tile.z_t
        rows, num_kept = len(z_s), min(self.k, z_s.shape[1])
        stats = z_s.new_zeros(rows, 4 + 2 * self.k)
        stats[:, 4:] = LOWEST  # a shard with fewer than k real columns is filled with zero probability
        index = torch.zeros(rows, self.k, dtype=torch.int64, device=z_s.device)
        if num_kept == 0:
            stats[:, :2] = LOWEST
            return stats, (index,)
        top, index[:, :num_kept] = z_t.topk(num_kept, dim=1)
        stats[:, 4 : 4 + num_kept] = top
        stats[:, 4 + self.k : 4 + self.k + num_kept] = z_s.gather(1, index[:, :num_kept])
        for i, z in enumerate((z_s, z_t)):
            stats[:, i] = z.amax(dim=1)
            tail = z.sub_(stats[:, i, None]).exp_().scatter_(1, index[:, :num_kept], 0.0)
            stats[:, 2 + i] = tail.sum(dim=1)  # mass of the tokens that are not gathered
        return stats, (index,)

    def merge(self, stats, local, rank):
        stats, num_tokens = stats.double(), stats.shape[1]
        z_t, z_s = (
            z.transpose(0, 1).reshape(num_tokens, -1) for z in (stats[..., 4 : 4 + self.k], stats[..., 4 + self.k :])
        )
        chosen = torch.zeros_like(z_t, dtype=torch.bool).scatter_(1, z_t.topk(self.k, dim=1).indices, True)
        log_s, p_s, tail_s = self._outcomes(z_s, stats[..., 0], stats[..., 2], chosen)
        log_t, p_t, tail_t = self._outcomes(z_t, stats[..., 1], stats[..., 3], chosen)
        real = chosen & (z_t > LOWEST)
        log_ratio = torch.where(real, (z_t - log_t[:, None]) - (z_s - log_s[:, None]), 0.0)
        kept = (torch.where(real, p_t, 0.0) * log_ratio).sum(dim=1)
        ratio = torch.where(tail_t > 0, tail_t / tail_s.clamp(min=1e-30), 0.0)
        tail = torch.where(tail_t > 0, tail_t * ratio.clamp(min=1e-300).log(), 0.0)
        local_columns = slice(rank * self.k, (rank + 1) * self.k)
        saved = (log_s.float(), log_t.float(), (1 - ratio).float(), *local, real[:, local_columns])
        return (kept + tail).clamp(min=0), saved

    @staticmethod
    def _outcomes(z: Tensor, maxima: Tensor, tails: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the log normalizer, the probabilities of all candidates, and the mass of the tokens not chosen.

        The probabilities sum to 1 in float64 although the tails are rounded, so the rounding of the two models does not
        look like a divergence.
        """
        top = maxima.amax(dim=0)
        exp = (z - top[:, None]).exp()
        tail = (tails * (maxima - top).exp()).sum(dim=0) + (exp * ~chosen).sum(dim=1)
        total = (exp * chosen).sum(dim=1) + tail
        return top + total.log(), exp / total[:, None], tail / total

    def gradient(self, tile: Tile, saved, factor):
        log_s, log_t, tail_factor, index, real = saved
        p_s = tile.z_s.sub_(log_s[:, None]).exp_()
        if (num_kept := min(self.k, p_s.shape[1])) == 0:
            return p_s
        index = index[:, :num_kept]
        chosen = p_s.gather(1, index)
        p_t = tile.z_t.gather(1, index).sub_(log_t[:, None]).exp_()
        p_s.mul_(tail_factor[:, None])
        values = torch.where(real[:, :num_kept], chosen - p_t, chosen * tail_factor[:, None])
        return p_s.scatter_(1, index, values).mul_(factor[:, None])
