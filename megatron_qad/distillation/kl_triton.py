"""Triton kernels for KL(teacher || student) on CUDA logits: one pass for its statistics, one for its gradient.

Together they read each logit of both models twice and write the student's once: 10 bytes per element in bfloat16.

The statistics are those of ``divergences.kl_stats``, summed in one pass with running maxima. With x = (z_s - max z_s) -
(z_t - max z_t), a program accumulates D_t = sum e^(z_t - max z_t), D_s, E = sum e_t x and R = D_s - D_t. R is summed
term by term as e_t expm1(x) where x is small, which avoids cancellation late in QAD. When a running maximum changes, x
changes by a constant delta, and E and R are updated: E <- a_t (E + delta D_t), R <- a_s R + (a_s - a_t) D_t.

expm1 is a polynomial. The GPU's fast exponential is precise enough; logarithms are computed in float64, because each
token needs only a few. Imported only if ``common.triton_serves`` returns True.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns per block: the fastest of fifteen and of twelve shapes on an H100 at 131072 columns. A single warp computes
# maxima without synchronizing with other warps.
_STATS_COLUMNS, _GRADIENT_COLUMNS = 1024, 8192
_STATS_LAUNCH = {"num_warps": 1}
_GRADIENT_LAUNCH = {"num_warps": 8}
_MERGE_TOKENS = 128
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_SMALL = tl.constexpr(0.7)


def stats(
    student: Tensor, teacher: Tensor, num_columns: int, temperatures: tuple[float, float], scale: Tensor | None
) -> Tensor:
    """Compute ``divergences.kl_stats`` of KL(teacher || student) for all logits.

    Args:
        student, teacher: logits [tokens, V/tp] of any float dtype, with contiguous rows.
        num_columns: number of columns before vocabulary padding.
        temperatures: the student's and the teacher's.
        scale: float32 [tokens]. Tokens of scale 0 are not read and get zeros. None means all tokens count.

    Returns:
        float32 [tokens, 5].
    """
    out = torch.empty(len(student), 5, device=student.device)
    if num_columns == 0:
        return out.copy_(out.new_tensor([_LOWEST.value, _LOWEST.value, 0, 0, 0]))
    if len(student):
        with torch.cuda.device_of(student):  # Triton launches on the current device; no-op on the CPU
            _stats_kernel[(len(student),)](
                *(student, student.stride(0), 1 / temperatures[0], teacher, teacher.stride(0), 1 / temperatures[1]),
                *(scale if scale is not None else out, out),
                NUM_COLUMNS=num_columns,  # constant within a job, so it compiles once
                HAS_TEMPERATURE=temperatures != (1.0, 1.0),
                ALL_COUNT=scale is None,
                COLUMNS=min(_STATS_COLUMNS, max(triton.next_power_of_2(num_columns), 8)),
                **_STATS_LAUNCH,
            )
    return out


def merge(stats: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute ``divergences.KL.merge`` of float32 [ranks, tokens, 5].

    Returns:
        The loss, float64 [tokens], and the tensors that ``write_gradient`` reads, float32 [tokens] each.
    """
    ranks, tokens, _ = stats.shape
    kl = torch.empty(tokens, dtype=torch.float64, device=stats.device)
    saved = torch.empty(4, tokens, device=stats.device)
    if tokens:
        with torch.cuda.device_of(stats):
            _merge_kernel[(triton.cdiv(tokens, _MERGE_TOKENS),)](
                *(stats, *stats.stride(), kl, saved, tokens),
                RANKS=ranks,
                TOKENS=_MERGE_TOKENS,
            )
    return kl, tuple(saved)


def write_gradient(
    out: Tensor, student: Tensor, teacher: Tensor, num_columns: int, temperatures: tuple[float, float], saved, factor
) -> None:
    """Write the gradient with respect to the student's logits divided by their temperature, times ``factor``.

    Args:
        out: [tokens, V/tp]; may be ``student`` itself. Padding and tokens of factor 0 become zero.
        saved: max z_s, max z_t, ratio and r_t from ``KL.merge``, float32 [tokens] each.
        factor: float32 [tokens].
    """
    tokens, width = out.shape
    if out.numel() == 0:
        return
    max_s, max_t, ratio, r_t = (tensor.contiguous() for tensor in saved)
    columns = min(_GRADIENT_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(out):
        _gradient_kernel[(tokens, triton.cdiv(width, columns))](
            *(student, student.stride(0), 1 / temperatures[0], teacher, teacher.stride(0), 1 / temperatures[1]),
            *(out, out.stride(0), max_s, max_t, ratio.log(), r_t, factor.contiguous()),
            NUM_COLUMNS=num_columns,
            WIDTH=width,
            HAS_TEMPERATURE=temperatures != (1.0, 1.0),
            COLUMNS=columns,
            **_GRADIENT_LAUNCH,
        )
    torch.autograd.graph.increment_version(out)  # so that autograd detects saved logits


@triton.jit
def _expm1_small(x):
    """e^x - 1 by its Taylor series up to x^10, with a relative error of 1e-9 at |x| = 0.7."""
    high = 1 / 5040 + x * (1 / 40320 + x * (1 / 362880 + x / 3628800))
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * high))))))


@triton.jit
def _exp(x):
    return tl.exp2(x * 1.4426950408889634)  # one instruction; tl.exp also handles subnormal results


@triton.jit
def _sum_groups(x, COLUMNS: tl.constexpr):
    """Sums of eight neighbours, which one thread holds. They need an eighth of the registers."""
    return tl.sum(tl.reshape(x, [COLUMNS // 8, 8]), axis=1)


@triton.jit
def _load_logits(pointer, columns, inside, factor, IS_MASKED: tl.constexpr, HAS_TEMPERATURE: tl.constexpr):
    if IS_MASKED:
        z = tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        z = tl.load(pointer + columns).to(tl.float32)
    if HAS_TEMPERATURE:
        z *= factor
    return z


@triton.jit
def _add_block(
    max_s, max_t, sum_s, sum_t, mean, difference, student, factor_s, teacher, factor_t, columns, inside,
    COLUMNS: tl.constexpr, IS_MASKED: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    z_s = _load_logits(student, columns, inside, factor_s, IS_MASKED, HAS_TEMPERATURE)
    z_t = _load_logits(teacher, columns, inside, factor_t, IS_MASKED, HAS_TEMPERATURE)
    if IS_MASKED:
        new_s = tl.maximum(max_s, tl.max(tl.where(inside, z_s, _LOWEST), axis=0))
        new_t = tl.maximum(max_t, tl.max(tl.where(inside, z_t, _LOWEST), axis=0))
    else:
        new_s = tl.maximum(max_s, tl.max(z_s, axis=0))
        new_t = tl.maximum(max_t, tl.max(z_t, axis=0))
    if (new_s > max_s) | (new_t > max_t):  # in the first blocks of a row, rarely later
        a_s = _exp(max_s - new_s)
        a_t = _exp(max_t - new_t)
        delta = (max_s - new_s) - (max_t - new_t)
        between = tl.where(tl.abs(delta) < _SMALL, a_t * _expm1_small(delta), a_s - a_t)
        difference = a_s * difference + between * sum_t
        mean = a_t * (mean + delta * sum_t)
        sum_t *= a_t
        sum_s *= a_s
    y_t = z_t - new_t
    y_s = z_s - new_s
    x = y_s - y_t
    e_t = _exp(y_t)
    e_s = _exp(y_s)
    term = tl.where(tl.abs(x) < _SMALL, e_t * _expm1_small(x), e_s - e_t)
    if IS_MASKED:
        e_t = tl.where(inside, e_t, 0.0)
        e_s = tl.where(inside, e_s, 0.0)
        term = tl.where(inside, term, 0.0)
        x = tl.where(inside, x, 0.0)
    sum_s += _sum_groups(e_s, COLUMNS)
    sum_t += _sum_groups(e_t, COLUMNS)
    mean += _sum_groups(e_t * x, COLUMNS)
    difference += _sum_groups(term, COLUMNS)
    return new_s, new_t, sum_s, sum_t, mean, difference


@triton.jit
def _stats_kernel(
    student, student_stride, factor_s, teacher, teacher_stride, factor_t, scale, out,
    NUM_COLUMNS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, ALL_COUNT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write one token's max z_t, max z_s, D_t, log(D_s / D_t) and KL within the shard to ``out`` [tokens, 5]."""
    token = tl.program_id(0).to(tl.int64)
    out += token * 5
    counts = True
    if not ALL_COUNT:
        counts = tl.load(scale + token) != 0
    if counts:
        student += token * student_stride
        teacher += token * teacher_stride
        lanes = tl.arange(0, COLUMNS)
        # Partial sums are added up at the end in float64, because log(1 + R / D_t) - E / D_t cancels.
        sum_s = tl.zeros([COLUMNS // 8], tl.float32)
        sum_t = tl.zeros([COLUMNS // 8], tl.float32)
        mean = tl.zeros([COLUMNS // 8], tl.float32)
        difference = tl.zeros([COLUMNS // 8], tl.float32)
        max_s = tl.full([], _LOWEST, tl.float32)
        max_t = tl.full([], _LOWEST, tl.float32)
        NUM_UNMASKED: tl.constexpr = NUM_COLUMNS // COLUMNS * COLUMNS
        for start in range(0, NUM_UNMASKED, COLUMNS):
            max_s, max_t, sum_s, sum_t, mean, difference = _add_block(
                max_s, max_t, sum_s, sum_t, mean, difference,
                student, factor_s, teacher, factor_t, start + lanes, None, COLUMNS, False, HAS_TEMPERATURE,
            )  # fmt: skip
        if NUM_UNMASKED < NUM_COLUMNS:
            columns = NUM_UNMASKED + lanes
            max_s, max_t, sum_s, sum_t, mean, difference = _add_block(
                max_s, max_t, sum_s, sum_t, mean, difference,
                student, factor_s, teacher, factor_t, columns, columns < NUM_COLUMNS, COLUMNS, True, HAS_TEMPERATURE,
            )  # fmt: skip
        total_s = tl.sum(sum_s.to(tl.float64), axis=0)
        total_t = tl.sum(sum_t.to(tl.float64), axis=0)
        growth = tl.sum(difference.to(tl.float64), axis=0) / total_t
        log_ratio = tl.log(tl.where(growth > -0.5, 1 + growth, total_s / total_t))
        tl.store(out, max_t)
        tl.store(out + 1, max_s)
        tl.store(out + 2, total_t.to(tl.float32))
        tl.store(out + 3, log_ratio.to(tl.float32))
        tl.store(out + 4, (log_ratio - tl.sum(mean.to(tl.float64), axis=0) / total_t).to(tl.float32))
    else:
        for i in tl.static_range(5):
            tl.store(out + i, 0.0)


@triton.jit
def _merge_kernel(
    stats, rank_stride, token_stride, stat_stride, kl, saved, num_tokens,
    RANKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Compute ``merge_kl`` and ``KL.merge`` for a block of tokens in float64."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = tokens < num_tokens
    stats += tokens * token_stride
    top_t = tl.full([TOKENS], _LOWEST, tl.float64)
    top_s = tl.full([TOKENS], _LOWEST, tl.float64)
    for rank in tl.static_range(RANKS):
        rank_stats = stats + rank * rank_stride
        top_t = tl.maximum(top_t, tl.load(rank_stats, mask=inside, other=0.0).to(tl.float64))
        top_s = tl.maximum(top_s, tl.load(rank_stats + stat_stride, mask=inside, other=0.0).to(tl.float64))
    total = tl.zeros([TOKENS], tl.float64)
    within = tl.zeros([TOKENS], tl.float64)
    mean_shift = tl.zeros([TOKENS], tl.float64)
    for rank in tl.static_range(RANKS):
        mass, shift, inner = _load_shard(stats + rank * rank_stride, stat_stride, inside, top_t)
        total += mass
        within += mass * inner
        mean_shift += mass * shift
    within /= total
    mean_shift /= total
    # log(sum of mass * e^(shift - mean shift)), relative to the largest term
    top = tl.full([TOKENS], -float("inf"), tl.float64)
    for rank in tl.static_range(RANKS):
        mass, shift, inner = _load_shard(stats + rank * rank_stride, stat_stride, inside, top_t)
        top = tl.maximum(top, tl.log(mass / total) + shift - mean_shift)
    between = tl.zeros([TOKENS], tl.float64)
    for rank in tl.static_range(RANKS):
        mass, shift, inner = _load_shard(stats + rank * rank_stride, stat_stride, inside, top_t)
        between += tl.exp(tl.log(mass / total) + shift - mean_shift - top)
    between = top + tl.log(between)
    log_r_t = -tl.log(total)  # max z_t - log Z_t
    log_r_s = top_s - (top_t - log_r_t + mean_shift + between)
    tl.store(kl + tokens, tl.maximum(within + between, 0.0), mask=inside)
    tl.store(saved + tokens, top_s.to(tl.float32), mask=inside)
    tl.store(saved + num_tokens + tokens, top_t.to(tl.float32), mask=inside)
    tl.store(saved + 2 * num_tokens + tokens, tl.exp(log_r_s - log_r_t).to(tl.float32), mask=inside)
    tl.store(saved + 3 * num_tokens + tokens, tl.exp(log_r_t).to(tl.float32), mask=inside)


@triton.jit
def _load_shard(shard_stats, stride, inside, top_t):
    """Load one shard's teacher mass relative to e^(max z_t), log Z_s - log Z_t, and KL within the shard."""
    max_t = tl.load(shard_stats, mask=inside, other=0.0).to(tl.float64)
    max_s = tl.load(shard_stats + stride, mask=inside, other=0.0).to(tl.float64)
    sum_t = tl.load(shard_stats + 2 * stride, mask=inside, other=1.0).to(tl.float64)
    log_ratio = tl.load(shard_stats + 3 * stride, mask=inside, other=0.0).to(tl.float64)
    within = tl.load(shard_stats + 4 * stride, mask=inside, other=0.0).to(tl.float64)
    return sum_t * tl.exp(max_t - top_t), max_s - max_t + log_ratio, within


@triton.jit
def _gradient_kernel(
    student, student_stride, factor_s, teacher, teacher_stride, factor_t, out, out_stride,
    max_s, max_t, log_ratio, r_t, factor,
    NUM_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a block of one token's gradient: r_t factor (e_s ratio - e_t)."""
    IS_MASKED: tl.constexpr = WIDTH % COLUMNS != 0 or NUM_COLUMNS != WIDTH
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < NUM_COLUMNS
    scale = tl.load(factor + token)
    gradient = tl.zeros([COLUMNS], tl.float32)
    if scale != 0:
        z_s = _load_logits(student + token * student_stride, columns, inside, factor_s, IS_MASKED, HAS_TEMPERATURE)
        z_t = _load_logits(teacher + token * teacher_stride, columns, inside, factor_t, IS_MASKED, HAS_TEMPERATURE)
        shift = tl.load(log_ratio + token)
        y_s = z_s - tl.load(max_s + token)
        y_t = z_t - tl.load(max_t + token)
        x = y_s - y_t + shift
        e_t = _exp(y_t)
        parts = tl.where(tl.abs(x) < _SMALL, e_t * _expm1_small(x), _exp(y_s + shift) - e_t)
        gradient = parts * (tl.load(r_t + token) * scale)
        if IS_MASKED:
            gradient = tl.where(inside, gradient, 0.0)
    out += token * out_stride
    if IS_MASKED:
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=columns < WIDTH)
    else:
        tl.store(out + columns, gradient.to(out.dtype.element_ty))
