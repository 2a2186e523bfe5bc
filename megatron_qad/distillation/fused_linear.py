"""Output layers of both models fused with their losses, so that no [tokens, V] tensor of either model ever exists.

A GEMM computes the logits of a chunk of tokens; they are reduced to the few values per token that the losses need, and
dropped. There are two ways to get the gradient:

- In the forward pass, for a single loss. Its gradient is known up to a factor that arrives in the backward pass and is
  the same for all tokens of a sum. It overwrites the chunk's logits and is multiplied with the output weight and the
  hidden states. It needs four GEMMs, as the unfused form does, and one collective per chunk. It holds one chunk of
  logits per model and, until the backward pass, a float32 sum of the size of the output weight.
- In the backward pass (``gradient_in_forward`` False, several losses, or a factor per token). The logits are computed
  again, which takes two more GEMMs, but only one collective.

Losses with two rounds (jsd) would need the logits a third time, so they are rejected with an error.

Tensor parallelism is that of a column-parallel output layer: every rank has the full hidden states and a weight
[V/tp, H]. The gradient of the hidden states is summed over the ranks here. With sequence parallelism the caller gathers
the hidden states first (Megatron's ``gather_from_sequence_parallel_region``, whose backward pass reduce-scatters) and
passes ``reduce_hidden_grad=False``.

If Megatron's DDP has put a ``main_grad`` on the student's weight, the gradient is added there and
``grad_added_to_main_grad`` is set, as in Megatron's fused weight gradient. A tied embedding marks its weight
``zero_out_wgrad`` and receives zeros, to which the embedding's own gradient is added. Otherwise the gradient is
returned to autograd.
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
"""Size of one chunk's logits, both models together. Each chunk reads both output weights and adds to a gradient of
their size, which pays off only for many tokens. On an H100 at V = 131072, chunks of 4096 tokens took 1.19 times as long
as the unchunked GEMMs, chunks of 2048 tokens 1.25 times, chunks of 512 tokens 1.63 times (docs/lab_log.md)."""
MIN_CHUNK_TOKENS = 128


def tokens_per_chunk(logits_width: int, element_size: int, device_type: str) -> int:
    """Return how many tokens' logits [V/tp] of both models fit in ``CHUNK_BYTES``, at least ``MIN_CHUNK_TOKENS``."""
    return max(CHUNK_BYTES[device_type] // (2 * logits_width * element_size), MIN_CHUNK_TOKENS)


def makes_gradient_in_forward(num_losses: int, num_tokens: int, hidden_size: int, element_size: int) -> bool:
    """Whether the gradient is computed in the forward pass by default.

    True for a single loss if the float32 [V/tp, H] sum takes no more memory than [tokens, V/tp] logits of both models.
    """
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
    """Compute ``logit_losses`` of ``hidden @ weight.T`` and ``teacher_hidden @ teacher_weight.T`` without full logits.

    The forward pass does one all-gather, or one per chunk with ``gradient_in_forward``. The backward pass does one
    all-reduce of the hidden states' gradient, or none if ``reduce_hidden_grad`` is False.

    Args:
        hidden: the student's final hidden states, [..., H_s], complete on every rank.
        weight: the student's output weight, [V/tp, H_s], of the same dtype.
        teacher_hidden, teacher_weight: the teacher's, [..., H_t] and [V/tp, H_t]; they get no gradient. None if no loss
            needs a teacher.
        labels, token_weight, ignore_index: ``labels``, ``weight`` and ``ignore_index`` of ``logit_losses``.
        chunk_tokens: number of tokens whose logits exist at a time. None means ``tokens_per_chunk``.
        gradient_in_forward: compute the gradient of a single loss in the forward pass, at the cost of a float32
            [V/tp, H_s] until the backward pass. None means ``makes_gradient_in_forward``.

    Raises:
        ValueError: as in ``logit_losses``; shapes do not match; a loss has two rounds.

    Example::

        hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
        (kl,) = fused_linear_losses([KL()], hidden, weight, torch.randn(4, 8), weight.detach(), None, VocabShard(0, 16))
        kl.sum().backward()
    """
    check_losses(losses, len(weight), has_teacher=teacher_hidden is not None, has_labels=labels is not None)
    for loss in losses:
        if loss.rounds > 1:
            raise ValueError(f"{type(loss).__name__} needs the logits twice and cannot be fused. Use logit_losses.")
    if teacher_hidden is not None and teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"student hidden states {list(hidden.shape)}, teacher hidden states {list(teacher_hidden.shape)}: "
            "expected the same tokens."
        )
    if teacher_weight is not None and len(teacher_weight) != len(weight):
        raise ValueError(
            f"student output weight {list(weight.shape)}, teacher output weight {list(teacher_weight.shape)}: expected "
            "the same V/tp."
        )
    scale = token_scale(hidden.shape[:-1].numel(), hidden.device, token_weight, labels, ignore_index)
    teacher = (teacher_hidden, teacher_weight)
    chunk_tokens = chunk_tokens or tokens_per_chunk(len(weight), weight.element_size(), weight.device.type)
    if gradient_in_forward is None:
        sizes = (len(scale), weight.shape[1], weight.element_size())
        # Not in float16, where the gradient needs the loss scale, which arrives in the backward pass.
        gradient_in_forward = makes_gradient_in_forward(len(losses), *sizes) and weight.dtype != torch.float16
    settings = (tuple(losses), chunk_tokens, reduce_hidden_grad, gradient_in_forward and len(losses) == 1)
    return _FusedLinearLosses.apply(hidden, weight, *teacher, labels, scale, shard, settings)


class _Chunks:
    """Computes the logits of both models for one chunk of tokens at a time.

    Tokens of scale 0 are left out of every GEMM, which costs one synchronization with the device. Rows are gathered
    only if there are such tokens.
    """

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
        """Return student and teacher logits [chunk tokens, V/tp] and labels of ``tokens``, one of ``self.tokens``."""
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
            chunk_results = []
            for tokens in chunks.tokens:
                student, teacher, chunk_labels = chunks.logits(tokens)
                stats = _chunk_stats(losses, shard, student, teacher, chunk_labels)
                if ctx.gradients is not None:
                    stats = merge_over_ranks(losses, *stats, shard)
                    kept = [tensors for _, tensors in stats]
                    write_gradients(student, student, teacher, chunk_labels, shard, losses, kept, [scale[tokens]])
                    ctx.gradients.add(tokens, student)
                chunk_results.append(stats)
            is_final = ctx.gradients is not None
            results = _concat_results(chunk_results) if is_final else _merge_chunks(losses, chunk_results, shard)
            for i, (loss, tensors) in enumerate(results):
                out[i, chunks.counted] = loss.float() * scale[chunks.counted]
                saved[i] = tensors
        ctx.num_saved = [len(s) for s in saved]
        ctx.save_for_backward(*inputs, scale, *(t for s in saved for t in s))
        return tuple(row.view(hidden.shape[:-1]) for row in out)

    @staticmethod
    def backward(ctx, *grads):
        *inputs, scale = ctx.saved_tensors[:6]
        hidden = inputs[0]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is not None and not any(grads[0].stride()):  # one value for all tokens, as from a sum
            grad_hidden, grad_weight = gradients.scaled(grads[0].flatten()[0], ctx.parameter)
        else:
            grad_hidden, grad_weight = _recompute_gradients(ctx, inputs, scale, grads)
        if grad_hidden is not None:
            group = ctx.shard.group
            if ctx.reduce_hidden_grad and group is not None and group.size() > 1:
                torch.distributed.all_reduce(grad_hidden, group=group)
            grad_hidden = grad_hidden.view(hidden.shape)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _recompute_gradients(ctx, inputs, scale: Tensor, grads) -> tuple[Tensor | None, Tensor | None]:
    """Compute the logits again and return the gradients of the hidden states [tokens, H] and the weight."""
    tensors, saved = list(ctx.saved_tensors[6:]), []
    for num_saved in ctx.num_saved:
        saved.append(tensors[:num_saved])
        tensors = tensors[num_saved:]
    chunks = _Chunks(*inputs, scale, ctx.chunk_tokens)
    gradients = _Gradients(chunks, ctx.needs_input_grad, getattr(ctx.parameter, "main_grad", None))
    done = 0
    for tokens in chunks.tokens:
        student, teacher, labels = chunks.logits(tokens)
        chunk_saved = [[t[done : done + len(student)] for t in s] for s in saved]
        factors = [g.reshape(-1)[tokens].float() * scale[tokens] for g in grads]
        write_gradients(student, student, teacher, labels, ctx.shard, ctx.losses, chunk_saved, factors)
        gradients.add(tokens, student)
        done += len(student)
    return gradients.hidden, gradients.for_autograd(ctx.parameter)


def _merge_chunks(losses, chunk_stats: list, shard: VocabShard) -> list:
    """Merge the statistics of all chunks over the ranks in one collective. Returns (loss, saved) of each loss."""
    parts = [torch.cat(chunks) for chunks in zip(*(parts for parts, _ in chunk_stats), strict=True)]
    local = [_concat_tuples(chunks) for chunks in zip(*(local for _, local in chunk_stats), strict=True)]
    return merge_over_ranks(losses, parts, local, shard)


def _concat_results(chunk_results: list) -> list:
    """Concatenate (loss, saved) of each loss over the chunks."""
    results = []
    for chunks in zip(*chunk_results, strict=True):
        losses, saved = zip(*chunks, strict=True)
        results.append((torch.cat(losses), _concat_tuples(saved)))
    return results


def _concat_tuples(tuples) -> tuple[Tensor, ...]:
    return tuple(torch.cat(tensors) for tensors in zip(*tuples, strict=True))


def _chunk_stats(losses, shard: VocabShard, student: Tensor, teacher: Tensor | None, labels: Tensor | None):
    tiles = Tiles(student, teacher, labels, shard)
    return local_stats(losses, tiles, tiles.slices, student.new_ones(len(student), dtype=torch.float32))


class _Gradients:
    """Accumulates the gradients of hidden states and output weight from the logit gradients of successive chunks."""

    def __init__(self, chunks: _Chunks, needs_input_grad, total: Tensor | None = None):
        """``total``: [V/tp, H] of any dtype, to which the weight's gradient is added. None means a new float32 sum,
        so that many chunks are rounded only once."""
        self.chunks, self.total = chunks, total
        self.needs_weight_grad = needs_input_grad[1]
        self.hidden = torch.zeros_like(chunks.hidden) if needs_input_grad[0] else None

    def add(self, tokens: Tensor | slice, grad: Tensor) -> None:
        """Add the contribution of ``grad``, the gradient of the student's logits [chunk tokens, V/tp]."""
        if self.hidden is not None and isinstance(tokens, slice):
            torch.mm(grad, self.chunks.weight, out=self.hidden[tokens])
        elif self.hidden is not None:
            self.hidden[tokens] = grad @ self.chunks.weight
        if self.needs_weight_grad:
            self.total = _add_matmul(grad.t(), self.chunks.hidden[tokens], self.total)

    def scaled(self, factor: Tensor, parameter: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Multiply both gradients by ``factor`` [] and return them as ``backward`` does."""
        if self.hidden is not None:
            self.hidden.mul_(factor)
        if self.total is not None:
            if (main_grad := getattr(parameter, "main_grad", None)) is None:
                self.total.mul_(factor)
            else:
                main_grad.addcmul_(self.total, factor.to(self.total.dtype))
        return self.hidden, self.for_autograd(parameter)

    def for_autograd(self, parameter: Tensor) -> Tensor | None:
        """Return the weight's gradient for autograd.

        With ``main_grad`` it is a placeholder of the same shape: zeros for a tied weight, otherwise uninitialized.
        """
        if not self.needs_weight_grad:
            return None
        if getattr(parameter, "main_grad", None) is None:
            return torch.zeros_like(parameter) if self.total is None else self.total.to(parameter.dtype)
        parameter.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(parameter, "zero_out_wgrad", False) else torch.empty_like
        return make(parameter)


def _add_matmul(a: Tensor, b: Tensor, total: Tensor | None) -> Tensor:
    """Return ``a @ b`` in float32, or add it to ``total``, within the GEMM if it can accumulate in that dtype."""
    if total is None:
        can_widen = a.is_cuda and a.dtype != torch.float32
        return torch.mm(a, b, out_dtype=torch.float32) if can_widen else (a @ b).float()
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    if total.is_cuda and total.dtype == torch.float32:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(a @ b)
