"""Output layers of both models and their loss in one operation: no [tokens, V] tensor of either ever exists.

The logits of a chunk of tokens are made by a GEMM, reduced to the few numbers a token that the losses need, and
dropped. The backward pass makes them again, writes their gradient over them, and multiplies it with the output weights
and the hidden states. So two GEMMs of the size of an output layer come on top of the unfused form's four; memory is a
chunk of logits of each model. Of losses of two rounds (jsd) the logits would be needed a third time: refused.

Tensor parallelism is that of a column-parallel output layer: hidden states whole on every rank, weights [V/tp, H].
The gradient of the hidden states is summed over the ranks here. With sequence parallelism the caller gathers the hidden
states first (Megatron's ``gather_from_sequence_parallel_region``, whose backward reduce-scatters) and passes
``reduce_hidden_grad=False``.

Where Megatron's DDP has put a ``main_grad`` on the student's weight, the gradient is added there and
``grad_added_to_main_grad`` set, as its fused weight gradient does; a tied embedding marks its weight ``zero_out_wgrad``
and then gets zeros, to which the embedding's own gradient adds. Elsewhere it is returned as a gradient like any other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_qad.distillation.tiles import Tiles, VocabShard
from megatron_qad.distillation.vocab_parallel import (
    LogitLoss,
    check_losses,
    local_stats,
    merge_over_ranks,
    token_scale,
    write_gradients,
)

CHUNK_BYTES = 256 << 20
"""Logits of one chunk, of both models. Each chunk reads both output weights and adds to a gradient of their size, which
only many tokens make worth while."""
MIN_CHUNK_TOKENS = 128


def tokens_of_chunk(logits_width: int, element_size: int) -> int:
    """How many tokens' logits of both models, [V/tp] each, fit in ``CHUNK_BYTES``; at least ``MIN_CHUNK_TOKENS``."""
    return max(CHUNK_BYTES // (2 * logits_width * element_size), MIN_CHUNK_TOKENS)


def fused_linear_losses(
    losses: Sequence[LogitLoss],
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None,
    shard: VocabShard,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    reduce_hidden_grad: bool = True,
) -> tuple[Tensor, ...]:
    """``vocab_parallel.logit_losses`` of ``hidden @ weight.T`` and ``teacher_hidden @ teacher_weight.T``.

    One all-gather forward; backward one all-reduce of the hidden states' gradient, unless ``reduce_hidden_grad`` is
    False, and then none.

    Args:
        hidden: [..., H_s], the student's final hidden states, whole on every rank. weight: [V/tp, H_s], same dtype.
        teacher_hidden, teacher_weight: the teacher's, [..., H_t] and [V/tp, H_t]; get no gradient. None where no loss
            needs a teacher.
        labels, token_weight, ignore_index: as ``labels``, ``weight``, ``ignore_index`` there.
        chunk_tokens: tokens whose logits exist at a time. None: ``tokens_of_chunk``.

    Raises:
        ValueError: as there; shapes that do not fit; a loss of two rounds.
    """
    check_losses(losses, len(weight), has_teacher=teacher_hidden is not None, has_labels=labels is not None)
    for loss in losses:
        if loss.rounds > 1:
            raise ValueError(f"{type(loss).__name__} reads the logits in two rounds; compute it unfused")
    if teacher_hidden is not None and teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"hidden states of the student {list(hidden.shape)} and the teacher {list(teacher_hidden.shape)}: "
            "expected the same tokens"
        )
    if teacher_weight is not None and len(teacher_weight) != len(weight):
        raise ValueError(f"output weights {list(weight.shape)} and {list(teacher_weight.shape)}: expected one V/tp")
    scale = token_scale(hidden.shape[:-1].numel(), hidden.device, token_weight, labels, ignore_index)
    teacher = (teacher_hidden, teacher_weight)
    chunk_tokens = chunk_tokens or tokens_of_chunk(len(weight), weight.element_size())
    settings = (tuple(losses), chunk_tokens, reduce_hidden_grad)
    return _FusedLinearLosses.apply(hidden, weight, *teacher, labels, scale, shard, settings)


class _Chunks:
    """The logits of both models, some tokens at a time. Tokens that do not count are left out of every GEMM."""

    def __init__(self, hidden, weight, teacher_hidden, teacher_weight, labels, counts: Tensor, chunk_tokens: int):
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self.weight = weight.detach()
        self.teacher = None
        if teacher_hidden is not None:
            self.teacher = (teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]), teacher_weight.detach())
        self.labels = None if labels is None else labels.reshape(-1)
        self.tokens = counts.nonzero()[:, 0].split(chunk_tokens) if counts.any() else ()

    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the student, of the teacher [len(tokens), V/tp], and the labels, of one chunk."""
        teacher = None
        if self.teacher is not None:
            teacher = self.teacher[0][tokens] @ self.teacher[1].t()
        return self.hidden[tokens] @ self.weight.t(), teacher, None if self.labels is None else self.labels[tokens]


class _FusedLinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, scale, shard, settings):
        losses, chunk_tokens, ctx.reduce_hidden_grad = settings
        inputs = (hidden, weight, teacher_hidden, teacher_weight, labels)
        chunks = _Chunks(*inputs, scale, chunk_tokens)
        ctx.set_materialize_grads(True)
        ctx.losses, ctx.shard, ctx.chunk_tokens, ctx.parameter = losses, shard, chunk_tokens, weight
        out = scale.new_zeros(len(losses), len(scale))
        saved: list[tuple[Tensor, ...]] = [() for _ in losses]
        if chunks.tokens:
            found = [_chunk_stats(losses, shard, *chunks.logits(tokens)) for tokens in chunks.tokens]
            parts = [torch.cat(of_chunks) for of_chunks in zip(*(parts for parts, _ in found), strict=True)]
            local = [
                tuple(torch.cat(tensors) for tensors in zip(*of_chunks, strict=True))
                for of_chunks in zip(*(local for _, local in found), strict=True)
            ]
            results = merge_over_ranks(losses, parts, local, shard)
            counted = torch.cat(chunks.tokens)
            for i, (loss, numbers) in enumerate(results):
                out[i, counted] = loss.float() * scale[counted]
                saved[i] = numbers
        ctx.num_saved = [len(s) for s in saved]
        ctx.save_for_backward(*inputs, scale, *(t for s in saved for t in s))
        return tuple(row.view(hidden.shape[:-1]) for row in out)

    @staticmethod
    def backward(ctx, *grads):
        *inputs, scale = ctx.saved_tensors[:6]
        rest, saved = list(ctx.saved_tensors[6:]), []
        for number in ctx.num_saved:
            saved.append(rest[:number])
            rest = rest[number:]
        hidden, weight = inputs[:2]
        chunks = _Chunks(*inputs, scale, ctx.chunk_tokens)
        grad_hidden = torch.zeros_like(chunks.hidden) if ctx.needs_input_grad[0] else None
        grad_weight = _WeightGradient(ctx.parameter) if ctx.needs_input_grad[1] else None
        done = 0
        for tokens in chunks.tokens:
            student, teacher, labels = chunks.logits(tokens)
            mine = [[t[done : done + len(tokens)] for t in s] for s in saved]
            factors = [g.reshape(-1)[tokens].float() * scale[tokens] for g in grads]
            write_gradients(student, student, teacher, labels, ctx.shard, ctx.losses, mine, factors)
            if grad_hidden is not None:
                grad_hidden[tokens] = student @ chunks.weight
            if grad_weight is not None:
                grad_weight.add(student, chunks.hidden[tokens])
            done += len(tokens)
        if grad_hidden is not None:
            group = ctx.shard.group
            if ctx.reduce_hidden_grad and group is not None and group.size() > 1:
                torch.distributed.all_reduce(grad_hidden, group=group)
            grad_hidden = grad_hidden.view(hidden.shape)
        return grad_hidden, grad_weight and grad_weight.result(), None, None, None, None, None, None


def _chunk_stats(losses, shard: VocabShard, student: Tensor, teacher: Tensor | None, labels: Tensor | None):
    tiles = Tiles(student, teacher, labels, shard)
    return local_stats(losses, tiles, tiles.slices, student.new_ones(len(student), dtype=torch.float32))


class _WeightGradient:
    """Sums G^T h of the chunks into ``main_grad`` or a tensor of its own."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.has_main_grad = getattr(weight, "main_grad", None) is not None
        # float32, so that many chunks round once
        self.total = weight.main_grad if self.has_main_grad else torch.zeros_like(weight, dtype=torch.float32)

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        if self.total.dtype == grad.dtype:
            self.total.addmm_(grad.t(), hidden)
        else:
            self.total.add_(grad.t() @ hidden)

    def result(self) -> Tensor:
        """What autograd accumulates: after ``main_grad`` something of the right shape that nobody reads, or zeros."""
        if not self.has_main_grad:
            return self.total.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight)
