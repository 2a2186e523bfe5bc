"""Losses over vocabulary-parallel logits: few numbers a token and rank, one collective, the gradient in place.

Each rank holds ``logits [..., V/tp]``. A loss (``LogitLoss``) reduces each token of its shard to a few numbers, one
all-gather carries those of all losses, and merging them gives the loss. The backward pass needs no collective: it
computes each logit's gradient from the logits and the merged numbers and writes it over the student's logits. Both
passes work in float32 tiles that are allocated once a pass, so neither makes a float32 copy of the logits.

The student's logits are consumed: after the backward pass they hold their own gradient. The write counts in the
tensor's version, so autograd refuses ("modified by an inplace operation") whatever else saved these logits and would
read them later, a second backward pass included. A gradient of its own, and no write, is made for a leaf, for strides
of which no flat view exists, for memory that several elements share, and on demand.

Columns past ``num_columns`` are vocabulary padding: they are in no distribution and their gradient is zero. Tokens of
weight zero have loss zero and gradient zero, whatever their logits hold; tiles of only such tokens are not computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.distillation.tiles import Tile, Tiles, VocabShard


@dataclass(frozen=True, kw_only=True)
class LogitLoss:
    """One loss: how a shard is reduced, how shards merge, and the gradient of a tile.

    A subclass is a frozen dataclass too; its fields are the settings that ``--qad-loss`` takes.

    Args:
        temperature, teacher_temperature: the distributions are softmax(logits / temperature) of each model. Losses are
            not rescaled by their squares.
    """

    temperature: float = 1.0
    teacher_temperature: float | None = None
    """None: ``temperature``."""

    needs_teacher = True
    needs_labels = False
    rounds = 1
    """Collectives of the forward pass over more than one rank."""

    def __post_init__(self):
        if self.teacher_temperature is None:
            object.__setattr__(self, "teacher_temperature", self.temperature)
        for value in (self.temperature, self.teacher_temperature):
            if not 0 < value < float("inf"):
                raise ValueError(f"temperature {value}: expected a number above 0")

    def check(self, width: int) -> None:
        """Raise QADError if the loss cannot be computed with shards of ``width`` = V/tp."""

    @property
    def temperatures(self) -> tuple[float, float]:
        """The student's and the teacher's."""
        return self.temperature, self.teacher_temperature

    def kernels(self, logits: Tensor):
        """A module with ``stats``, ``merge`` and ``write_gradient`` for whole logits, such as ``kl_triton``, where
        these lie on a device that it serves; None: tiles."""
        return None

    def shard_stats(self, tile: Tile) -> tuple[Tensor, tuple[Tensor, ...]]:
        """float32 [rows, k], and what stays on this rank for ``merge``, each [rows, ...]."""
        raise NotImplementedError

    def merge(self, stats: Tensor, local: tuple[Tensor, ...], rank: int) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """float32 [ranks, tokens, k] -> the loss, float64 [tokens], and what ``gradient`` reads, each [tokens, ...].

        The loss is None for a loss of two rounds."""
        raise NotImplementedError

    def second_stats(self, tile: Tile, saved: tuple[Tensor, ...]) -> Tensor:
        """float32 [rows, k], to be summed over ranks; for a loss of two rounds."""
        raise NotImplementedError

    def merge_second(self, sums: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """float64 [tokens, k] -> as ``merge``; for a loss of two rounds."""
        raise NotImplementedError

    def gradient(self, tile: Tile, saved: tuple[Tensor, ...], factor: Tensor) -> Tensor:
        """factor [rows] times d loss / d z_s of each token, [rows, num_columns], in one of the tile's tensors."""
        raise NotImplementedError


def all_gather(stats: Tensor, group) -> Tensor:
    """[tokens, k] of each rank -> [ranks, tokens, k]; one collective, none for one rank."""
    if group is None or group.size() == 1:
        return stats.unsqueeze(0)
    out = stats.new_empty(group.size() * stats.shape[0], *stats.shape[1:])
    torch.distributed.all_gather_into_tensor(out, stats.contiguous(), group=group)
    return out.view(group.size(), *stats.shape)


def logit_losses(
    losses: Sequence[LogitLoss],
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    shard: VocabShard,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    in_place: bool = True,
) -> tuple[Tensor, ...]:
    """Several losses of the same logits, each float32 [...], in nats a token (squared logits for MSE).

    One all-gather for all of them (and one more where a loss has two rounds), none in the backward pass.

    Args:
        student: [..., V/tp], float32, bfloat16 or float16. Consumed by the backward pass.
        teacher: same shape, any float dtype; gets no gradient. None if no loss needs it.
        labels: int64 [...], token ids in the whole vocabulary; None if no loss needs them.
        weight: float [...], multiplies each token's losses; 0 leaves the token out. None: 1.
        ignore_index: tokens of this label are left out.
        in_place: False keeps the student's logits.

    Raises:
        ValueError: shapes that differ, a missing teacher or missing labels, or what a loss cannot do (``check``).
    """
    if teacher is not None and student.shape != teacher.shape:
        raise ValueError(f"student logits {list(student.shape)}, teacher logits {list(teacher.shape)}")
    check_losses(losses, student.shape[-1], has_teacher=teacher is not None, has_labels=labels is not None)
    scale = token_scale(student.shape[:-1].numel(), student.device, weight, labels, ignore_index)
    in_place = in_place and not (student.is_leaf and student.requires_grad) and not _shares_memory(student)
    return _LogitLosses.apply(student, teacher, labels, scale, shard, tuple(losses), in_place)


def check_losses(losses: Sequence[LogitLoss], width: int, *, has_teacher: bool, has_labels: bool) -> None:
    """Raise ValueError if a loss lacks an input or cannot be computed with shards of ``width`` = V/tp."""
    for loss in losses:
        loss.check(width)
        if loss.needs_teacher and not has_teacher:
            raise ValueError(f"{type(loss).__name__} needs the teacher's logits")
        if loss.needs_labels and not has_labels:
            raise ValueError(f"{type(loss).__name__} needs labels")


def token_scale(num_tokens: int, device, weight: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor:
    """float32 [tokens]: each token's weight, 0 where its label is to be ignored."""
    scale = torch.ones(num_tokens, device=device) if weight is None else weight.detach().reshape(-1).float()
    return scale if labels is None else scale.masked_fill(labels.reshape(-1) == ignore_index, 0.0)


def _shares_memory(tensor: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


class _LogitLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, labels, scale, shard, losses, in_place):
        shape, width = student.shape[:-1], student.shape[-1]
        flat_teacher = None if teacher is None else teacher.detach().reshape(-1, width)
        tiles = Tiles(student.detach().reshape(-1, width), flat_teacher, labels, shard)
        # Kernels skip what does not count, and asking a GPU would stop it.
        by_kernels = all(loss.kernels(tiles.student) is not None for loss in losses)
        live = [] if by_kernels else [rows for rows, _ in tiles.live(scale)]
        if live or by_kernels:
            results = merge_over_ranks(losses, *local_stats(losses, tiles, live, scale), shard)
            if any(loss.rounds == 2 for loss in losses):
                results = _second_round(losses, results, tiles, live, len(scale), shard)
        else:  # every rank knows: the weights are the same on all
            results = [(scale.double(), ()) for _ in losses]
        ctx.num_saved = [len(saved) for _, saved in results]
        ctx.save_for_backward(student, teacher, labels, scale, *(t for _, saved in results for t in saved))
        ctx.shard, ctx.losses, ctx.in_place = shard, losses, in_place
        out = [torch.where(scale == 0, 0.0, loss.float() * scale).view(shape) for loss, _ in results]
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        student, teacher, labels, scale, *rest = ctx.saved_tensors
        saved = []
        for number in ctx.num_saved:
            saved.append(rest[:number])
            rest = rest[number:]
        width = student.shape[-1]
        logits = student.detach().reshape(-1, width)  # a copy where strides allow no view
        out = logits if ctx.in_place else torch.empty_like(logits)
        flat_teacher = None if teacher is None else teacher.reshape(-1, width)
        factors = [g.reshape(-1).float() * scale for g in grads]
        write_gradients(out, logits, flat_teacher, labels, ctx.shard, ctx.losses, saved, factors)
        return out.view(student.shape), None, None, None, None, None, None


def local_stats(losses, tiles: Tiles, live, scale: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """Of each loss: this shard's numbers, float32 [tokens, k], zero for tokens of no live tile; and what stays here."""
    parts: list[Tensor | None] = [_stats_by_kernel(loss, tiles, scale) for loss in losses]
    local: list[tuple[Tensor, ...]] = [()] * len(losses)
    in_tiles = [i for i, part in enumerate(parts) if part is None]
    for rows in live if in_tiles else ():
        for i in in_tiles:
            stats, mine = losses[i].shard_stats(tiles.load(rows, losses[i]))
            if parts[i] is None:
                parts[i] = stats.new_zeros(len(scale), stats.shape[1])
                local[i] = tuple(t.new_zeros(len(scale), *t.shape[1:]) for t in mine)
            parts[i][rows] = stats
            for whole, part in zip(local[i], mine, strict=True):
                whole[rows] = part
    return parts, local


def _stats_by_kernel(loss: LogitLoss, tiles: Tiles, scale: Tensor) -> Tensor | None:
    if (kernels := loss.kernels(tiles.student)) is None:
        return None
    return kernels.stats(tiles.student, tiles.teacher, tiles.columns, loss.temperatures, scale)


def merge_over_ranks(losses, parts: list[Tensor], local, shard: VocabShard) -> list:
    """(loss or None, saved) of each loss, float64 and float32 [tokens]. The one collective."""
    gathered = all_gather(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), shard.group)
    rank = 0 if shard.group is None else shard.group.rank()
    split = gathered.split([part.shape[1] for part in parts], dim=2)
    return [loss.merge(s, mine, rank) for loss, s, mine in zip(losses, split, local, strict=True)]


def _second_round(losses, results, tiles: Tiles, live, num_tokens: int, shard: VocabShard) -> list:
    number = sum(loss.rounds == 2 for loss in losses)
    sums = [None] * number
    for rows in live:
        which = 0
        for loss, (_, saved) in zip(losses, results, strict=True):
            if loss.rounds == 2:
                found = loss.second_stats(tiles.load(rows, loss), tuple(t[rows] for t in saved))
                if sums[which] is None:
                    sums[which] = found.new_zeros(num_tokens, found.shape[1])
                sums[which][rows] = found
                which += 1
    totals = all_gather(torch.cat(sums, dim=1), shard.group).double().sum(dim=0)
    split = iter(totals.split([part.shape[1] for part in sums], dim=1))
    return [
        loss.merge_second(next(split), result[1]) if loss.rounds == 2 else result
        for loss, result in zip(losses, results, strict=True)
    ]


def write_gradients(out, student, teacher, labels, shard: VocabShard, losses, saved, factors) -> None:
    """Sum over losses of factor [tokens] times its gradient in the student's logits, over ``out`` [tokens, V/tp], which
    may be ``student`` itself. No collective."""
    if len(losses) == 1 and saved[0] and (kernels := losses[0].kernels(student)) is not None:
        factor = losses[0].kernel_factor(saved[0], factors[0])
        if losses[0].temperature != 1.0:
            factor = factor / losses[0].temperature
        kernels.write_gradient(out, student, teacher, shard.num_columns, losses[0].temperatures, saved[0][:4], factor)
        return
    tiles = Tiles(student, teacher, labels, shard)
    total = torch.stack([f.abs() for f in factors]).sum(dim=0)
    done = 0
    for rows, every in tiles.live(total):
        out[done : rows.start] = 0
        done = rows.stop
        _write_tile(out[rows, : shard.num_columns], tiles, rows, every, losses, saved, factors)
    out[done:] = 0
    out[:, shard.num_columns :] = 0


def _write_tile(out: Tensor, tiles: Tiles, rows: slice, every: bool, losses, saved, factors) -> None:
    """The same for the real columns of a few tokens."""
    total = None
    overwrites = out.data_ptr() == tiles.student[rows].data_ptr()
    own = out if overwrites and out.dtype == torch.float32 and len(losses) == 1 else None
    for loss, mine, factor in zip(losses, saved, factors, strict=True):
        if not mine:
            continue
        factor = factor[rows] / loss.temperature
        grad = loss.gradient(tiles.load(rows, loss, own), tuple(t[rows] for t in mine), factor)
        if not every:
            grad.masked_fill_(factor[:, None] == 0, 0.0)  # such a token may hold NaN
        if len(losses) > 1:
            grad = grad.clone() if total is None else total.add_(grad)
        total = grad
    if total is not None and total.data_ptr() != out.data_ptr():
        out.copy_(total)
