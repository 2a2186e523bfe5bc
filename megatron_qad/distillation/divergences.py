"""Divergences between teacher and student distributions: forward, reverse and confidence-weighted KL, Jensen-Shannon.

KL(t || s) of sharded distributions is E[KL within a shard] + KL between the shard masses, where the expectation is over
the teacher's shard masses. Within a shard, with x = (z_s - max z_s) - (z_t - max z_t), KL = log(D_s / D_t) - E_t[x].
Late in QAD the KL is small and D_s / D_t is close to 1, so D_s - D_t is summed term by term to avoid cancellation:
e^a - e^b = e^b (e^(a - b) - 1), or (e^a + e^b) tanh((a - b) / 2), which never overflows. The remaining error is a few
1e-8 of E_t|x|; subtracting two log-sum-exps instead would have an error of 1e-7 of the logits. Each rank sends five
values per token, which are merged in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.distillation.tiles import LOWEST, Tile
from megatron_qad.distillation.vocab_parallel import LogitLoss
from megatron_qad.formats.common import triton_serves


def kl_stats(p: Tensor, q: Tensor, x: Tensor, scratch: Tensor) -> Tensor:
    """Return the statistics of KL(p || q) in this shard, float32 [tokens, 5].

    They are max p, max q, D_p = sum e^(p - max p), log(D_q / D_p), and the KL between the renormalized shards.

    Args:
        p, q: logits, float32 [tokens, columns]; overwritten.
        x, scratch: tensors of the same shape and dtype for intermediate results; overwritten.
    """
    if p.shape[1] == 0:
        return p.new_tensor([LOWEST, LOWEST, 0, 0, 0]).expand(p.shape[0], 5)
    max_p, max_q = p.amax(dim=1), q.amax(dim=1)
    p.sub_(max_p[:, None])
    q.sub_(max_q[:, None])
    torch.sub(q, p, out=x)
    e_p = torch.exp(p, out=scratch)
    sum_p = e_p.sum(dim=1)
    mean = torch.linalg.vecdot(e_p, x) / sum_p
    # expm1 is cheaper than exp and tanh, but fails where e^p underflows under a large q, and cancels where D_q / D_p is
    # near 0. The check would synchronize with a GPU, so only the CPU takes this path.
    if x.device.type == "cpu":
        is_near = x.amax(dim=1) < 40
        growth = x.expm1_().mul_(e_p).sum(dim=1) / sum_p  # D_q / D_p - 1
        is_near &= growth > -0.5
        log_ratio = growth.log1p()
        if not bool(is_near.all()):
            log_ratio = torch.where(is_near, log_ratio, _log_ratio(p, q, x, e_p, sum_p))
    else:
        log_ratio = _log_ratio(p, q, x, e_p, sum_p)
    return torch.stack((max_p, max_q, sum_p, log_ratio, log_ratio - mean), dim=1)


def _log_ratio(p: Tensor, q: Tensor, x: Tensor, e_p: Tensor, sum_p: Tensor) -> Tensor:
    """Return log(D_q / D_p) for any ``p`` and ``q``, which are relative to their maxima. Overwrites ``x`` and ``q``."""
    torch.sub(q, p, out=x).mul_(0.5).tanh_()
    sum_q = q.exp_().sum(dim=1)
    growth = q.add_(e_p).mul_(x).sum(dim=1) / sum_p
    return torch.where(growth > -0.5, growth.clamp(min=-0.5).log1p(), (sum_q / sum_p).log())


def merge_kl(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge float32 [ranks, tokens, 5] into KL(p || q), log Z_p and log Z_q, each float64 [tokens]."""
    max_p, max_q, sum_p, log_ratio, within = stats.double().unbind(dim=2)
    top = max_p.amax(dim=0)
    mass = sum_p * (max_p - top).exp()
    total = mass.sum(dim=0)
    mass = mass / total
    shift = max_q - max_p + log_ratio  # log Z_q - log Z_p of each shard
    mean_shift = (mass * shift).sum(dim=0)
    between = (mass.log() + shift - mean_shift).logsumexp(dim=0)
    log_z_p = top + total.log()
    kl = ((mass * within).sum(dim=0) + between).clamp(min=0)  # rounding may turn 0 into -1e-9
    return kl, log_z_p, log_z_p + mean_shift + between


@dataclass(frozen=True, kw_only=True)
class KL(LogitLoss):
    """Forward KL divergence, KL(teacher || student). Its gradient is (p_s - p_t) / temperature."""

    def kernels(self, logits: Tensor):
        if not triton_serves(logits):
            return None
        from megatron_qad.distillation import kl_triton

        return kl_triton

    def kernel_factor(self, saved, factor: Tensor) -> Tensor:
        """Return the factor [tokens] of each token's gradient for ``kernels().write_gradient``; zeros stay zero."""
        return factor

    def shard_stats(self, tile: Tile):
        return kl_stats(tile.z_t, tile.z_s, tile.scratch_a, tile.scratch_b), ()

    def merge(self, stats, local, rank):
        if (kernels := self.kernels(stats)) is not None:
            return kernels.merge(stats)
        kl, log_t, log_s = merge_kl(stats)
        # softmax(z) = e^(z - m) r, where m is the largest logit and r = e^m / Z. Likely tokens then have exponents near
        # 0, which float32 represents more precisely than z - log Z. Where the models agree, the ratio of their r is 1.
        max_t, max_s = stats[..., 0].double().amax(dim=0), stats[..., 1].double().amax(dim=0)
        log_r_s, log_r_t = max_s - log_s, max_t - log_t
        return kl, tuple(v.float() for v in (max_s, max_t, (log_r_s - log_r_t).exp(), log_r_t.exp()))

    def gradient(self, tile: Tile, saved, factor):
        max_s, max_t, ratio, r_t = saved[:4]
        e_s, e_t = tile.z_s.sub_(max_s[:, None]).exp_(), tile.z_t.sub_(max_t[:, None]).exp_()
        return torch.addcmul(e_t, e_s, ratio[:, None], value=-1, out=e_s).mul_(-(r_t * factor)[:, None])


@dataclass(frozen=True, kw_only=True)
class ConfidenceKL(KL):
    """Forward KL with each token scaled by the teacher's highest probability raised to ``power``.

    A positive power emphasizes tokens on which the teacher is confident, a negative one those on which it is not.
    Token-scaled logit distillation (Kim et al. 2023, arXiv 2308.06744) does the latter by the teacher's cross entropy.
    """

    power: float = 1.0

    def merge(self, stats, local, rank):
        kl, saved = super().merge(stats, local, rank)
        scale = saved[3].double() ** self.power  # e^(max z_t) / Z_t
        return kl * scale, (*saved, scale.float())

    def kernel_factor(self, saved, factor: Tensor) -> Tensor:
        return torch.where(factor == 0, 0.0, factor * saved[4])  # masked tokens may be infinite

    def gradient(self, tile: Tile, saved, factor):
        return super().gradient(tile, saved, self.kernel_factor(saved, factor))


@dataclass(frozen=True, kw_only=True)
class ReverseKL(LogitLoss):
    """Reverse KL divergence, KL(student || teacher). Its gradient is p_s (log(p_s / p_t) - KL) / temperature."""

    def shard_stats(self, tile: Tile):
        return kl_stats(tile.z_s, tile.z_t, tile.scratch_a, tile.scratch_b), ()

    def merge(self, stats, local, rank):
        kl, log_s, log_t = merge_kl(stats)
        return kl, (log_s.float(), (log_t - log_s - kl).float())

    def gradient(self, tile: Tile, saved, factor):
        log_s, shift = saved
        centred = torch.sub(tile.z_s, tile.z_t, out=tile.scratch_a).add_(shift[:, None])
        return tile.z_s.sub_(log_s[:, None]).exp_().mul_(centred).mul_(factor[:, None])


@dataclass(frozen=True, kw_only=True)
class JSD(LogitLoss):
    """Generalized Jensen-Shannon divergence as in GKD (Agarwal et al. 2023, arXiv 2306.13649).

    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student. It takes two
    collectives, because m needs the normalizers over the full vocabulary first.
    """

    beta: float = 0.5

    rounds = 2

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise ValueError(
                f"jsd(beta={self.beta}): expected a number between 0 and 1. Use kl or reverse_kl for the limits."
            )

    def shard_stats(self, tile: Tile):
        return kl_stats(tile.z_t, tile.z_s, tile.scratch_a, tile.scratch_b), ()

    def merge(self, stats, local, rank):
        _, log_t, log_s = merge_kl(stats)
        # The difference is taken in float64, so y = log p_s - log p_t keeps its precision for large normalizers.
        return None, (log_s.float(), log_t.float(), (log_t - log_s).float())

    def second_stats(self, tile: Tile, saved):
        p_s, p_t, y, log_m = self._parts(tile, saved)
        student = torch.sub(y, log_m, out=y).mul_(p_s)  # p_s log(p_s / m)
        return torch.stack((student.sum(dim=1), log_m.mul_(p_t).sum(dim=1)), dim=1)

    def merge_second(self, sums, saved):
        student, teacher = sums[:, 0], -sums[:, 1]
        return self.beta * teacher + (1 - self.beta) * student, (*saved, student.float())

    def gradient(self, tile: Tile, saved, factor):
        p_s, _, y, log_m = self._parts(tile, saved[:3])
        return y.sub_(log_m).sub_(saved[3][:, None]).mul_(p_s).mul_(((1 - self.beta) * factor)[:, None])

    def _parts(self, tile: Tile, saved):
        """Return p_s, p_t, y = log(p_s / p_t) and log(m / p_t) = log1p((1 - beta) expm1(y)), in the tile's memory."""
        log_s, log_t, shift = saved
        # Where the ratio exceeds e^80, the smaller probability is zero in float32.
        y = torch.sub(tile.z_s, tile.z_t, out=tile.scratch_a).add_(shift[:, None]).clamp_(-80, 80)
        p_s, p_t = tile.z_s.sub_(log_s[:, None]).exp_(), tile.z_t.sub_(log_t[:, None]).exp_()
        return p_s, p_t, y, torch.expm1(y, out=tile.scratch_b).mul_(1 - self.beta).log1p_()
