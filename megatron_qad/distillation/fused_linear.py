"""Output layers of both models and their loss in one operation: no [tokens, V] tensor of either ever exists.

The logits of a chunk of tokens are made by a GEMM, reduced to the few numbers a token that the losses need, and
dropped. Of one loss the gradient can be made at once, up to the factor that arrives in the backward pass and is the
same for all tokens of a sum: it is written over the chunk's logits and multiplied with the output weights and the
hidden states. These are the unfused form's four GEMMs; memory is a chunk of logits of each model and, until the
backward pass, a float32 sum of the size of the output weight; tensor-parallel ranks meet once a chunk.

Without that sum (``gradient_in_forward`` False), for several losses, and where tokens get factors of their own, the
backward pass makes the logits again: two GEMMs more, and ranks meet once. Of losses of two rounds (jsd) the logits
would be needed a third time: refused.

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

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
"""Logits of one chunk, of both models. Each chunk reads both output weights and adds to a gradient of their size, which
only many tokens make worth while: on an H100 at V = 131072 chunks of 4096 tokens took 1.19 times the time of the whole
GEMMs, of 2048 tokens 1.25, of 512 1.63 (docs/lab_log.md)."""
MIN_CHUNK_TOKENS = 128


def tokens_of_chunk(logits_width: int, element_size: int, device_type: str) -> int:
    """How many tokens' logits of both models, [V/tp] each, fit in ``CHUNK_BYTES``; at least ``MIN_CHUNK_TOKENS``."""
    return max(CHUNK_BYTES[device_type] // (2 * logits_width * element_size), MIN_CHUNK_TOKENS)


def makes_gradient_in_forward(num_losses: int, num_tokens: int, hidden_size: int, element_size: int) -> bool:
    """Whether the gradient is made in the forward pass unless the caller says: of one loss, where the float32 [V/tp, H]
    that it needs takes no more than the logits of both models, [tokens, V/tp] each, would."""
    return num_losses == 1 and 4 * hidden_size <= 2 * num_tokens * element_size


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
    gradient_in_forward: bool | None = None,
) -> tuple[Tensor, ...]:
    """``vocab_parallel.logit_losses`` of ``hidden @ weight.T`` and ``teacher_hidden @ teacher_weight.T``.

    One all-gather forward, or one a chunk with ``gradient_in_forward``; backward one all-reduce of the hidden states'
    gradient, unless ``reduce_hidden_grad`` is False, and then none.

    Args:
        hidden: [..., H_s], the student's final hidden states, whole on every rank. weight: [V/tp, H_s], same dtype.
        teacher_hidden, teacher_weight: the teacher's, [..., H_t] and [V/tp, H_t]; get no gradient. None where no loss
            needs a teacher.
        labels, token_weight, ignore_index: as ``labels``, ``weight``, ``ignore_index`` there.
        chunk_tokens: tokens whose logits exist at a time. None: ``tokens_of_chunk``.
        gradient_in_forward: whether one loss's gradient is made in the forward pass, at the price of a float32 [V/tp,
            H_s] until the backward pass. None: ``makes_gradient_in_forward``.

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
    chunk_tokens = chunk_tokens or tokens_of_chunk(len(weight), weight.element_size(), weight.device.type)
    if gradient_in_forward is None:
        sizes = (len(scale), weight.shape[1], weight.element_size())
        # Not in float16, in which a gradient needs the loss scale that arrives in the backward pass.
        gradient_in_forward = makes_gradient_in_forward(len(losses), *sizes) and weight.dtype != torch.float16
    settings = (tuple(losses), chunk_tokens, reduce_hidden_grad, gradient_in_forward and len(losses) == 1)
    return _FusedLinearLosses.apply(hidden, weight, *teacher, labels, scale, shard, settings)


class _Chunks:
    """The logits of both models, some tokens at a time. Tokens that do not count are left out of every GEMM, at the
    price of one synchronization with the device; where all count, nothing is gathered."""

    def __init__(self, hidden, weight, teacher_hidden, teacher_weight, labels, counts: Tensor, chunk_tokens: int):
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self.weight = weight.detach()
        self.teacher = None
        if teacher_hidden is not None:
            self.teacher = (teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]), teacher_weight.detach())
        self.labels = None if labels is None else labels.reshape(-1)
        counted = counts.nonzero()[:, 0]
        if len(counted) == len(counts):
            starts = range(0, len(counts), chunk_tokens)
            self.tokens = [slice(start, min(start + chunk_tokens, len(counts))) for start in starts]
            self.counted = slice(None)
        else:
            self.tokens = counted.split(chunk_tokens) if len(counted) else []
            self.counted = counted

    def logits(self, tokens: Tensor | slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of the student, of the teacher, [tokens of the chunk, V/tp], and the labels, of one of ``tokens``."""
        teacher = None
        if self.teacher is not None:
            teacher = self.teacher[0][tokens] @ self.teacher[1].t()
        return self.hidden[tokens] @ self.weight.t(), teacher, None if self.labels is None else self.labels[tokens]


class _FusedLinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels, scale, shard, settings):
        losses, chunk_tokens, ctx.reduce_hidden_grad, in_forward = settings
        inputs = (hidden, weight, teacher_hidden, teacher_weight, labels)
        chunks = _Chunks(*inputs, scale, chunk_tokens)
        ctx.set_materialize_grads(True)
        ctx.losses, ctx.shard, ctx.chunk_tokens, ctx.parameter = losses, shard, chunk_tokens, weight
        ctx.gradients = None
        if in_forward and any(ctx.needs_input_grad[:2]):
            ctx.gradients = _Gradients(chunks, ctx.needs_input_grad)
        out = scale.new_zeros(len(losses), len(scale))
        saved: list[tuple[Tensor, ...]] = [() for _ in losses]
        if chunks.tokens:
            found = []
            for tokens in chunks.tokens:
                student, teacher, of_labels = chunks.logits(tokens)
                stats = _chunk_stats(losses, shard, student, teacher, of_labels)
                if ctx.gradients is not None:
                    stats = merge_over_ranks(losses, *stats, shard)
                    numbers = [numbers for _, numbers in stats]
                    write_gradients(student, student, teacher, of_labels, shard, losses, numbers, [scale[tokens]])
                    ctx.gradients.add(tokens, student)
                found.append(stats)
            results = _joined_results(found) if ctx.gradients is not None else _merged(losses, found, shard)
            for i, (loss, numbers) in enumerate(results):
                out[i, chunks.counted] = loss.float() * scale[chunks.counted]
                saved[i] = numbers
        ctx.num_saved = [len(s) for s in saved]
        ctx.save_for_backward(*inputs, scale, *(t for s in saved for t in s))
        return tuple(row.view(hidden.shape[:-1]) for row in out)

    @staticmethod
    def backward(ctx, *grads):
        *inputs, scale = ctx.saved_tensors[:6]
        hidden = inputs[0]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None and not any(grads[0].stride()):  # one number for all tokens, as of a sum
            grad_hidden, grad_weight = gradients.scaled(grads[0].flatten()[0], ctx.parameter)
        else:
            grad_hidden, grad_weight = _recomputed(ctx, inputs, scale, grads)
        if grad_hidden is not None:
            group = ctx.shard.group
            if ctx.reduce_hidden_grad and group is not None and group.size() > 1:
                torch.distributed.all_reduce(grad_hidden, group=group)
            grad_hidden = grad_hidden.view(hidden.shape)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _recomputed(ctx, inputs, scale: Tensor, grads) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden states [tokens, H] and weight from logits that are made once more."""
    rest, saved = list(ctx.saved_tensors[6:]), []
    for number in ctx.num_saved:
        saved.append(rest[:number])
        rest = rest[number:]
    chunks = _Chunks(*inputs, scale, ctx.chunk_tokens)
    gradients = _Gradients(chunks, ctx.needs_input_grad, getattr(ctx.parameter, "main_grad", None))
    done = 0
    for tokens in chunks.tokens:
        student, teacher, labels = chunks.logits(tokens)
        mine = [[t[done : done + len(student)] for t in s] for s in saved]
        factors = [g.reshape(-1)[tokens].float() * scale[tokens] for g in grads]
        write_gradients(student, student, teacher, labels, ctx.shard, ctx.losses, mine, factors)
        gradients.add(tokens, student)
        done += len(student)
    return gradients.hidden, gradients.for_autograd(ctx.parameter)


def _merged(losses, found: list, shard: VocabShard) -> list:
    """What chunks hold in their stats, in one collective: (loss, numbers) of each loss."""
    parts = [torch.cat(of_chunks) for of_chunks in zip(*(parts for parts, _ in found), strict=True)]
    local = [_joined(of_chunks) for of_chunks in zip(*(local for _, local in found), strict=True)]
    return merge_over_ranks(losses, parts, local, shard)


def _joined_results(found: list) -> list:
    """(loss, numbers) of each loss in each chunk -> of all tokens."""
    results = []
    for of_chunks in zip(*found, strict=True):
        losses, numbers = zip(*of_chunks, strict=True)
        results.append((torch.cat(losses), _joined(numbers)))
    return results


def _joined(tuples) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*tuples, strict=True))


def _chunk_stats(losses, shard: VocabShard, student: Tensor, teacher: Tensor | None, labels: Tensor | None):
    tiles = Tiles(student, teacher, labels, shard)
    return local_stats(losses, tiles, tiles.slices, student.new_ones(len(student), dtype=torch.float32))


class _Gradients:
    """Of hidden states and output weight, from the logits' gradient of one chunk after the other."""

    def __init__(self, chunks: _Chunks, needs_input_grad, total: Tensor | None = None):
        """total: [V/tp, H] of any dtype, to which the weight's gradient is added. None: to a float32 sum of its own, so
        that many chunks round once."""
        self.chunks, self.total = chunks, total
        self.of_the_weight = needs_input_grad[1]
        self.hidden = torch.zeros_like(chunks.hidden) if needs_input_grad[0] else None

    def add(self, tokens: Tensor | slice, grad: Tensor) -> None:
        """grad: [tokens of the chunk, V/tp], of the student's logits."""
        if self.hidden is not None and isinstance(tokens, slice):
            torch.mm(grad, self.chunks.weight, out=self.hidden[tokens])
        elif self.hidden is not None:
            self.hidden[tokens] = grad @ self.chunks.weight
        if self.of_the_weight:
            self.total = _product(grad.t(), self.chunks.hidden[tokens], self.total)

    def scaled(self, factor: Tensor, parameter: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Both times ``factor`` [], the hidden states' and what autograd accumulates for the weight."""
        if self.hidden is not None:
            self.hidden.mul_(factor)
        if self.total is not None:
            if (main_grad := getattr(parameter, "main_grad", None)) is None:
                self.total.mul_(factor)
            else:
                main_grad.addcmul_(self.total, factor.to(self.total.dtype))
        return self.hidden, self.for_autograd(parameter)

    def for_autograd(self, parameter: Tensor) -> Tensor | None:
        """What it accumulates for the weight: after ``main_grad`` something of its shape that nobody reads, or 0."""
        if not self.of_the_weight:
            return None
        if getattr(parameter, "main_grad", None) is None:
            return torch.zeros_like(parameter) if self.total is None else self.total.to(parameter.dtype)
        parameter.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like
        return make(parameter)


def _product(a: Tensor, b: Tensor, total: Tensor | None) -> Tensor:
    """a @ b in float32, or added to ``total``, summed in its dtype where one call of the GEMM can do that."""
    if total is None:
        short = a.is_cuda and a.dtype != torch.float32
        return torch.mm(a, b, out_dtype=torch.float32) if short else (a @ b).float()
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    if total.is_cuda and total.dtype == torch.float32:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(a @ b)
