"""Losses over vocab-parallel logits with one collective and the gradient written in place.

Each rank holds ``logits [..., V/tp]``. A loss (``LogitLoss``) reduces each token of its shard to a few values, one
all-gather exchanges those of all losses, and merging them gives the loss. The backward pass needs no collective: it
computes each logit's gradient from the logits and the merged values and writes it over the student's logits. Both
passes work in float32 tiles that are allocated once per pass, so neither makes a float32 copy of the logits.

The student's logits are overwritten: after the backward pass they hold their own gradient. The write increments the
tensor's version, so autograd raises "modified by an inplace operation" for any other operation that saved these logits
and reads them later, including a second backward pass. The gradient goes to a new tensor if the student is a leaf, if
its strides do not allow a flat view, if several elements share memory, or if ``in_place`` is False.

Columns past ``num_columns`` are vocabulary padding: they belong to no distribution and their gradient is zero. Tokens
of weight zero have loss zero and gradient zero, whatever their logits are; tiles with only such tokens are skipped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_qad.distillation.tiles import Tile, Tiles, VocabShard


@dataclass(frozen=True, kw_only=True)
class LogitLoss:
    """Base class of losses of the logits: reduces a shard, merges shards, and computes the gradient of a tile.

    Subclasses are frozen dataclasses whose fields are the settings that ``--qad-loss`` accepts.

    Args:
        temperature, teacher_temperature: each model's distribution is softmax(logits / temperature). Losses are not
            rescaled by the squared temperature.
    """

    temperature: float = 1.0
    teacher_temperature: float | None = None
    """Temperature of the teacher. None means ``temperature``."""

    needs_teacher = True
    needs_labels = False
    rounds = 1
    """Number of collectives of the forward pass with several ranks, 1 or 2."""

    def __post_init__(self):
        if self.teacher_temperature is None:
            object.__setattr__(self, "teacher_temperature", self.temperature)
        for value in (self.temperature, self.teacher_temperature):
            if not 0 < value < float("inf"):
                raise ValueError(f"temperature {value}: expected a finite number above 0.")

    def check(self, width: int) -> None:
        """Raise QADError if the loss cannot be computed on shards of ``width`` = V/tp columns."""

    @property
    def temperatures(self) -> tuple[float, float]:
        """Temperatures of the student and the teacher."""
        return self.temperature, self.teacher_temperature

    def kernels(self, logits: Tensor):
        """Return a module with ``stats``, ``merge`` and ``write_gradient`` for these logits, such as ``kl_triton``.

        None means that there is none for their device, and the loss is computed in tiles.
        """
        return None

    def shard_stats(self, tile: Tile) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the statistics of each token, float32 [rows, k], and tensors [rows, ...] that only this rank's
        ``merge`` receives."""
        raise NotImplementedError

    def merge(self, stats: Tensor, local: tuple[Tensor, ...], rank: int) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Merge statistics float32 [ranks, tokens, k].

        Returns:
            The loss, float64 [tokens], or None if it has two rounds; and the tensors [tokens, ...] for ``gradient``.
        """
        raise NotImplementedError

    def second_stats(self, tile: Tile, saved: tuple[Tensor, ...]) -> Tensor:
        """Return statistics float32 [rows, k] that are summed over ranks. Only for losses of two rounds."""
        raise NotImplementedError

    def merge_second(self, sums: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the same as ``merge`` from the sums, float64 [tokens, k]. Only for losses of two rounds."""
        raise NotImplementedError

    def gradient(self, tile: Tile, saved: tuple[Tensor, ...], factor: Tensor) -> Tensor:
        """Return ``factor`` [rows] times d loss / d z_s, [rows, num_columns], in one of the tile's tensors."""
        raise NotImplementedError


def all_gather(stats: Tensor, group) -> Tensor:
    """Gather [tokens, k] of each rank into [ranks, tokens, k]. One collective, or none for one rank."""
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
    """Compute several losses of the same logits, each float32 [...] in nats per token (squared logits for MSE).

    The forward pass does one all-gather for all losses, and one more if a loss has two rounds. The backward pass does
    no collective.

    Args:
        student: logits [..., V/tp] in float32, bfloat16 or float16. The backward pass overwrites them.
        teacher: logits of the same shape and any float dtype; they get no gradient. None if no loss needs them.
        labels: token ids in the full vocabulary, int64 [...]. None if no loss needs them.
        weight: float [...] that multiplies each token's losses; 0 leaves the token out. None means 1.
        ignore_index: tokens with this label are left out.
        in_place: False keeps the student's logits.

    Raises:
        ValueError: shapes differ, or the teacher or the labels are missing.
        QADError: a loss cannot be computed on shards of this width.

    Example::

        student, teacher = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8)
        kl, reverse_kl = logit_losses([KL(), ReverseKL()], student, teacher, None, VocabShard(0, 8))
        (kl + 0.5 * reverse_kl).mean().backward()
    """
    if teacher is not None and student.shape != teacher.shape:
        raise ValueError(
            f"student logits {list(student.shape)}, teacher logits {list(teacher.shape)}: expected the same shape."
        )
    check_losses(losses, student.shape[-1], has_teacher=teacher is not None, has_labels=labels is not None)
    scale = token_scale(student.shape[:-1].numel(), student.device, weight, labels, ignore_index)
    in_place = in_place and not (student.is_leaf and student.requires_grad) and not _shares_memory(student)
    return _LogitLosses.apply(student, teacher, labels, scale, shard, tuple(losses), in_place)


def check_losses(losses: Sequence[LogitLoss], width: int, *, has_teacher: bool, has_labels: bool) -> None:
    """Raise ValueError if a loss lacks an input, QADError if it cannot be computed on ``width`` = V/tp columns."""
    for loss in losses:
        loss.check(width)
        if loss.needs_teacher and not has_teacher:
            raise ValueError(f"{type(loss).__name__} needs the teacher's logits, which were not given.")
        if loss.needs_labels and not has_labels:
            raise ValueError(f"{type(loss).__name__} needs labels, which were not given.")


def token_scale(num_tokens: int, device, weight: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor:
    """Return each token's weight, float32 [tokens], with 0 where the label is ``ignore_index``."""
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
        # Kernels skip tokens of weight 0 themselves; looking for active tiles would synchronize with the GPU.
        by_kernels = all(loss.kernels(tiles.student) is not None for loss in losses)
        active = [] if by_kernels else [rows for rows, _ in tiles.active_tiles(scale)]
        if active or by_kernels:
            results = merge_over_ranks(losses, *local_stats(losses, tiles, active, scale), shard)
            if any(loss.rounds == 2 for loss in losses):
                results = _second_round(losses, results, tiles, active, len(scale), shard)
        else:  # the same branch on every rank, because all ranks have the same weights
            results = [(scale.double(), ()) for _ in losses]
        ctx.num_saved = [len(saved) for _, saved in results]
        ctx.save_for_backward(student, teacher, labels, scale, *(t for _, saved in results for t in saved))
        ctx.shard, ctx.losses, ctx.in_place = shard, losses, in_place
        out = [torch.where(scale == 0, 0.0, loss.float() * scale).view(shape) for loss, _ in results]
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        student, teacher, labels, scale, *tensors = ctx.saved_tensors
        saved = []
        for num_saved in ctx.num_saved:
            saved.append(tensors[:num_saved])
            tensors = tensors[num_saved:]
        width = student.shape[-1]
        logits = student.detach().reshape(-1, width)  # a copy if the strides allow no view
        out = logits if ctx.in_place else torch.empty_like(logits)
        flat_teacher = None if teacher is None else teacher.reshape(-1, width)
        factors = [g.reshape(-1).float() * scale for g in grads]
        write_gradients(out, logits, flat_teacher, labels, ctx.shard, ctx.losses, saved, factors)
        return out.view(student.shape), None, None, None, None, None, None


def local_stats(losses, tiles: Tiles, active, scale: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """Return each loss's statistics of this shard, float32 [tokens, k], and the tensors that stay on this rank.

    Both are zero for tokens outside the ``active`` tiles.
    """
    parts: list[Tensor | None] = [_stats_by_kernel(loss, tiles, scale) for loss in losses]
    local: list[tuple[Tensor, ...]] = [()] * len(losses)
    in_tiles = [i for i, part in enumerate(parts) if part is None]
    for rows in active if in_tiles else ():
        for i in in_tiles:
            stats, tile_local = losses[i].shard_stats(tiles.load(rows, losses[i]))
            if parts[i] is None:
                parts[i] = stats.new_zeros(len(scale), stats.shape[1])
                local[i] = tuple(t.new_zeros(len(scale), *t.shape[1:]) for t in tile_local)
            parts[i][rows] = stats
            for out, tensor in zip(local[i], tile_local, strict=True):
                out[rows] = tensor
    return parts, local


def _stats_by_kernel(loss: LogitLoss, tiles: Tiles, scale: Tensor) -> Tensor | None:
    if (kernels := loss.kernels(tiles.student)) is None:
        return None
    return kernels.stats(tiles.student, tiles.teacher, tiles.columns, loss.temperatures, scale)


def merge_over_ranks(losses, parts: list[Tensor], local, shard: VocabShard) -> list:
    """Return (loss or None, saved) of each loss, float64 and float32 [tokens]. One collective."""
    gathered = all_gather(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), shard.group)
    rank = 0 if shard.group is None else shard.group.rank()
    split = gathered.split([part.shape[1] for part in parts], dim=2)
    return [loss.merge(stats, kept, rank) for loss, stats, kept in zip(losses, split, local, strict=True)]


def _second_round(losses, results, tiles: Tiles, active, num_tokens: int, shard: VocabShard) -> list:
    sums = [None] * sum(loss.rounds == 2 for loss in losses)
    for rows in active:
        i = 0
        for loss, (_, saved) in zip(losses, results, strict=True):
            if loss.rounds == 2:
                stats = loss.second_stats(tiles.load(rows, loss), tuple(t[rows] for t in saved))
                if sums[i] is None:
                    sums[i] = stats.new_zeros(num_tokens, stats.shape[1])
                sums[i][rows] = stats
                i += 1
    totals = all_gather(torch.cat(sums, dim=1), shard.group).double().sum(dim=0)
    split = iter(totals.split([part.shape[1] for part in sums], dim=1))
    return [
        loss.merge_second(next(split), result[1]) if loss.rounds == 2 else result
        for loss, result in zip(losses, results, strict=True)
    ]


def write_gradients(out, student, teacher, labels, shard: VocabShard, losses, saved, factors) -> None:
    """Write the sum over losses of factor [tokens] times the gradient with respect to the student's logits.

    ``out`` [tokens, V/tp] may be ``student`` itself. No collective.
    """
    if len(losses) == 1 and saved[0] and (kernels := losses[0].kernels(student)) is not None:
        factor = losses[0].kernel_factor(saved[0], factors[0])
        if losses[0].temperature != 1.0:
            factor = factor / losses[0].temperature
        kernels.write_gradient(out, student, teacher, shard.num_columns, losses[0].temperatures, saved[0][:4], factor)
        return
    tiles = Tiles(student, teacher, labels, shard)
    total = torch.stack([f.abs() for f in factors]).sum(dim=0)
    done = 0
    for rows, every in tiles.active_tiles(total):
        out[done : rows.start] = 0
        done = rows.stop
        _write_tile(out[rows, : shard.num_columns], tiles, rows, every, losses, saved, factors)
    out[done:] = 0
    out[:, shard.num_columns :] = 0


def _write_tile(out: Tensor, tiles: Tiles, rows: slice, every: bool, losses, saved, factors) -> None:
    """Write the gradient of one tile's unpadded columns. ``every`` means that no token of it has a zero factor."""
    total = None
    overwrites = out.data_ptr() == tiles.student[rows].data_ptr()
    in_place = out if overwrites and out.dtype == torch.float32 and len(losses) == 1 else None
    for loss, tensors, factor in zip(losses, saved, factors, strict=True):
        if not tensors:
            continue
        factor = factor[rows] / loss.temperature
        grad = loss.gradient(tiles.load(rows, loss, in_place), tuple(t[rows] for t in tensors), factor)
        if not every:
            grad.masked_fill_(factor[:, None] == 0, 0.0)  # such a token may hold NaN
        if len(losses) > 1:
            grad = grad.clone() if total is None else total.add_(grad)
        total = grad
    if total is not None and total.data_ptr() != out.data_ptr():
        out.copy_(total)
