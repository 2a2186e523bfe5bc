"""KL divergence and cross entropy per token over vocabulary-parallel logits, with their own backward passes.

Each rank holds ``logits [..., V/tp]``. A token's loss needs only a few numbers a rank: its maximum, its sum of
exponentials and a weighted sum. One all-gather merges them; the backward pass needs no collective and writes the
gradient over the student's logits, so that neither pass makes a float32 copy of them: tokens are taken in chunks.

The student's logits are consumed: after the backward pass they hold their own gradient. Columns past ``num_columns``
are vocabulary padding: they are not part of either distribution and their gradient is zero.
"""

import torch
from torch import Tensor

# Tokens are processed in chunks of about this many logits: 2 Mi float32 elements stay near the cache and
# their pages are reused, where one buffer for all tokens is paged in anew each time.
CHUNK_ELEMENTS = 1 << 21
# Stands for minus infinity in maxima: a rank whose columns are all padding merges as a zero, never as NaN.
_LOWEST = torch.finfo(torch.float32).min


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    group=None,
    *,
    num_columns: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) of each token, in nats, float32.

    Args:
        student_logits: [..., V/tp], float32, bfloat16 or float16. Consumed by the backward pass.
        teacher_logits: same shape, any float dtype; gets no gradient.
        group: tensor-parallel process group; None or one rank: no collective.
        num_columns: columns of this rank that are real vocabulary; None: all.
        temperature: both distributions are softmax(logits / temperature). The loss is not rescaled by its square.

    Returns:
        [...]: the divergence of each token's distributions.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {list(student_logits.shape)}, teacher logits {list(teacher_logits.shape)}")
    return _KLDivergence.apply(student_logits, teacher_logits, group, num_columns, 1.0 / temperature)


def cross_entropy(
    logits: Tensor, labels: Tensor, group=None, *, num_columns: int | None = None, first_column: int = 0
) -> Tensor:
    """Cross entropy of each token against ``labels``, in nats, float32 [...].

    Args:
        logits: [..., V/tp]; consumed by the backward pass.
        labels: int64 [...], token ids in the whole vocabulary.
        first_column: the token id of this rank's first column.
        group, num_columns: as in ``kl_divergence``.
    """
    return _CrossEntropy.apply(logits, labels, group, num_columns, first_column)


def all_gather(stats: Tensor, group) -> Tensor:
    """[tokens, k] of each rank -> [ranks, tokens, k]; one collective, none for one rank."""
    if group is None or group.size() == 1:
        return stats.unsqueeze(0)
    out = stats.new_empty(group.size() * stats.shape[0], *stats.shape[1:])
    torch.distributed.all_gather_into_tensor(out, stats.contiguous(), group=group)
    return out.view(group.size(), *stats.shape)


def token_chunks(num_tokens: int, num_columns: int):
    step = max(1, CHUNK_ELEMENTS // max(1, num_columns))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def shard_stats(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [t, columns] -> (maximum [t], exp(z - maximum) [t, columns], its sum [t]).

    ``z`` is overwritten: pass a copy of what must live on.
    """
    if z.shape[1] == 0:
        return z.new_full((z.shape[0],), _LOWEST), z, z.new_zeros(z.shape[0])
    maximum = z.amax(dim=1)
    exp = z.sub_(maximum[:, None]).exp_()
    return maximum, exp, exp.sum(dim=1)


def merge_log_sum_exp(maxima: Tensor, sums: Tensor) -> Tensor:
    """[ranks, t] maxima and sums of exponentials -> log of the sum over the whole vocabulary, [t]."""
    top = maxima.amax(dim=0)
    return top + (sums * (maxima - top).exp()).sum(dim=0).log()


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, group, num_columns, inverse_temperature):
        shape, width = student.shape[:-1], student.shape[-1]
        columns = width if num_columns is None else num_columns
        student2d, teacher2d = student.detach().reshape(-1, width), teacher.detach().reshape(-1, width)
        stats = torch.empty(student2d.shape[0], 5, dtype=torch.float32, device=student.device)
        for rows in token_chunks(student2d.shape[0], columns):
            z_s = student2d[rows, :columns].float() * inverse_temperature
            z_t = teacher2d[rows, :columns].float() * inverse_temperature
            difference = z_t - z_s
            max_s, _, sum_s = shard_stats(z_s)
            max_t, exp_t, sum_t = shard_stats(z_t)
            weighted = (exp_t * difference).sum(dim=1)  # sum of e^(z_t - max_t) (z_t - z_s)
            stats[rows] = torch.stack((max_s, sum_s, max_t, sum_t, weighted), dim=1)
        max_s, sum_s, max_t, sum_t, weighted = all_gather(stats, group).unbind(dim=2)
        log_s, log_t = merge_log_sum_exp(max_s, sum_s), merge_log_sum_exp(max_t, sum_t)
        # KL = E_t[z_t - z_s] - log Z_t + log Z_s
        loss = (weighted * (max_t - log_t).exp()).sum(dim=0) - log_t + log_s
        ctx.save_for_backward(student, teacher, log_s, log_t)
        ctx.columns, ctx.inverse_temperature = columns, inverse_temperature
        return loss.view(shape)

    @staticmethod
    def backward(ctx, grad):
        student, teacher, log_s, log_t = ctx.saved_tensors
        width, columns, scale = student.shape[-1], ctx.columns, ctx.inverse_temperature
        # detach(): the saved tensor's version must not count this write, which nobody reads again. reshape: a copy, and
        # so not over the logits, only where their strides allow no view.
        grad_logits, teacher2d = student.detach().reshape(-1, width), teacher.reshape(-1, width)
        grad = grad.reshape(-1).float() * scale
        for rows in token_chunks(grad_logits.shape[0], columns):
            p_s = grad_logits[rows, :columns].float().mul_(scale).sub_(log_s[rows, None]).exp_()
            # copy: float32 logits of the teacher are not ours to write
            p_t = teacher2d[rows, :columns].to(torch.float32, copy=True).mul_(scale).sub_(log_t[rows, None]).exp_()
            grad_logits[rows, :columns] = p_s.sub_(p_t).mul_(grad[rows, None])
        grad_logits[:, columns:] = 0
        return grad_logits.view(student.shape), None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group, num_columns, first_column):
        shape, width = logits.shape[:-1], logits.shape[-1]
        columns = width if num_columns is None else num_columns
        logits2d = logits.detach().reshape(-1, width)
        index = labels.reshape(-1) - first_column
        here = (index >= 0) & (index < columns)
        index = index.clamp(0, max(columns - 1, 0))
        stats = torch.empty(logits2d.shape[0], 3, dtype=torch.float32, device=logits.device)
        stats[:, 2] = torch.where(here, logits2d.gather(1, index[:, None])[:, 0].float(), 0.0)
        for rows in token_chunks(logits2d.shape[0], columns):
            maximum, _, total = shard_stats(logits2d[rows, :columns].to(torch.float32, copy=True))
            stats[rows, 0], stats[rows, 1] = maximum, total
        maxima, sums, label_logits = all_gather(stats, group).unbind(dim=2)
        log_z = merge_log_sum_exp(maxima, sums)
        ctx.save_for_backward(logits, index, here, log_z)
        ctx.columns = columns
        return (log_z - label_logits.sum(dim=0)).view(shape)

    @staticmethod
    def backward(ctx, grad):
        logits, index, here, log_z = ctx.saved_tensors
        width, columns = logits.shape[-1], ctx.columns
        grad_logits = logits.detach().reshape(-1, width)  # as above
        grad = grad.reshape(-1).float()
        for rows in token_chunks(grad_logits.shape[0], columns):
            p = grad_logits[rows, :columns].float().sub_(log_z[rows, None]).exp_()
            if columns:
                p.scatter_add_(1, index[rows, None], -here[rows, None].float())
            grad_logits[rows, :columns] = p.mul_(grad[rows, None])
        grad_logits[:, columns:] = 0
        return grad_logits.view(logits.shape), None, None, None, None
