"""Triton kernels of KL(teacher || student) for CUDA logits: one pass for its numbers, one for its gradient.

Together they read each logit of both models twice and write the student's once: 10 bytes an element in bfloat16.

The numbers are those of ``divergences.kl_stats``, summed in one pass with running maxima. With x = (z_s - max z_s) -
(z_t - max z_t), a program keeps D_t = sum e^(z_t - max z_t), D_s, E = sum e_t x and R = D_s - D_t, the last summed term
by term as e_t expm1(x) where x is small, so that late in QAD nothing cancels. Where a maximum moves, x moves by a
constant delta, and E and R follow: E <- a_t (E + delta D_t), R <- a_s R + (a_s - a_t) D_t.

expm1 is a polynomial. Of the GPU's fast functions the exponential is good enough, the logarithm near 1 is not: those of
the sums are left to torch, in float64. Imported only where ``common.triton_serves`` says so.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns a program takes at a time. Not tuned: no GPU was at hand.
_COLUMNS = 4096
_LAUNCH = {"num_warps": 8}
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_SMALL = tl.constexpr(0.7)


def stats(
    student: Tensor, teacher: Tensor, num_columns: int, temperatures: tuple[float, float], scale: Tensor | None
) -> Tensor:
    """``divergences.kl_stats`` of KL(teacher || student) for whole logits.

    Args:
        student, teacher: [tokens, V/tp] of any float dtype, with contiguous rows.
        num_columns: real columns of the vocabulary among them.
        temperatures: the student's and the teacher's.
        scale: float32 [tokens]; tokens of weight 0 are not read and get zeros. None: all count.

    Returns:
        float32 [tokens, 5].
    """
    tokens = len(student)
    sums = torch.zeros(tokens, 6, dtype=torch.float64, device=student.device)
    if num_columns == 0:
        sums[:, :2] = _LOWEST.value
        return sums[:, :5].float()
    if tokens:
        with torch.cuda.device_of(student):  # triton launches on the current device; nothing on the CPU
            _stats_kernel[(tokens,)](
                *(student, student.stride(0), 1 / temperatures[0], teacher, teacher.stride(0), 1 / temperatures[1]),
                *(scale if scale is not None else sums, sums),
                NUM_COLUMNS=num_columns,  # one number a job
                ALL_COUNT=scale is None,
                COLUMNS=min(_COLUMNS, triton.next_power_of_2(num_columns)),
                **_LAUNCH,
            )
    max_t, max_s, sum_t, sum_s, mean, difference = sums.unbind(dim=1)
    some = sum_t > 0
    sum_t = torch.where(some, sum_t, 1.0)
    ratio = difference / sum_t
    log_ratio = torch.where(ratio > -0.5, ratio.clamp(min=-0.5).log1p(), (sum_s / sum_t).log())
    log_ratio = torch.where(some, log_ratio, 0.0)
    found = (max_t, max_s, torch.where(some, sum_t, 0.0), log_ratio, log_ratio - mean / sum_t)
    return torch.stack(found, dim=1).float()


def write_gradient(
    out: Tensor, student: Tensor, teacher: Tensor, num_columns: int, temperatures: tuple[float, float], saved, factor
) -> None:
    """factor [tokens] times the gradient in the student's logits over its temperature, into ``out`` [tokens, V/tp].

    Args:
        out: may be ``student`` itself. Padding and tokens of factor 0 become zero.
        saved: ``KL.merge``'s max z_s, max z_t, ratio, r_t, float32 [tokens] each.
    """
    tokens, width = out.shape
    if out.numel() == 0:
        return
    max_s, max_t, ratio, r_t = (tensor.contiguous() for tensor in saved)
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    with torch.cuda.device_of(out):
        _gradient_kernel[(tokens, triton.cdiv(width, columns))](
            *(student, student.stride(0), 1 / temperatures[0], teacher, teacher.stride(0), 1 / temperatures[1]),
            *(out, out.stride(0), max_s, max_t, ratio.log(), r_t, factor.contiguous()),
            NUM_COLUMNS=num_columns,
            WIDTH=width,
            COLUMNS=columns,
            **_LAUNCH,
        )


@triton.jit
def _expm1_of_small(x):
    """e^x - 1 by its Taylor series up to x^10: a relative 1e-9 at |x| = 0.7."""
    high = 1 / 5040 + x * (1 / 40320 + x * (1 / 362880 + x / 3628800))
    return x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * high))))))


@triton.jit
def _logits(pointer, columns, inside, factor):
    return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32) * factor


@triton.jit
def _stats_kernel(
    student, student_stride, factor_s, teacher, teacher_stride, factor_t, scale, out,
    NUM_COLUMNS: tl.constexpr, ALL_COUNT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token: [max z_t, max z_s, D_t, D_s, E, R] into ``out`` [tokens, 6]."""
    token = tl.program_id(0).to(tl.int64)
    counts = True
    if not ALL_COUNT:
        counts = tl.load(scale + token) != 0
    if counts:
        student += token * student_stride
        teacher += token * teacher_stride
        lanes = tl.arange(0, COLUMNS)
        # Of the lanes; summed over them at the end, in float64, because log(1 + R / D_t) - E / D_t cancels.
        sum_t = tl.zeros([COLUMNS], tl.float32)
        sum_s = tl.zeros([COLUMNS], tl.float32)
        mean = tl.zeros([COLUMNS], tl.float32)
        difference = tl.zeros([COLUMNS], tl.float32)
        max_s = tl.full([], _LOWEST, tl.float32)
        max_t = tl.full([], _LOWEST, tl.float32)
        for start in range(0, NUM_COLUMNS, COLUMNS):
            columns = start + lanes
            inside = columns < NUM_COLUMNS
            z_s = _logits(student, columns, inside, factor_s)
            z_t = _logits(teacher, columns, inside, factor_t)
            new_s = tl.maximum(max_s, tl.max(tl.where(inside, z_s, _LOWEST), axis=0))
            new_t = tl.maximum(max_t, tl.max(tl.where(inside, z_t, _LOWEST), axis=0))
            a_s = tl.exp(max_s - new_s)
            a_t = tl.exp(max_t - new_t)
            delta = (max_s - new_s) - (max_t - new_t)
            between = tl.where(tl.abs(delta) < _SMALL, a_t * _expm1_of_small(delta), a_s - a_t)
            difference = a_s * difference + between * sum_t
            mean = a_t * (mean + delta * sum_t)
            y_t = z_t - new_t
            y_s = z_s - new_s
            x = tl.where(inside, y_s - y_t, 0.0)
            e_t = tl.where(inside, tl.exp(y_t), 0.0)
            e_s = tl.where(inside, tl.exp(y_s), 0.0)
            difference += tl.where(tl.abs(x) < _SMALL, e_t * _expm1_of_small(x), e_s - e_t)
            mean += e_t * x
            sum_t = a_t * sum_t + e_t
            sum_s = a_s * sum_s + e_s
            max_s = new_s
            max_t = new_t
        out += token * 6
        tl.store(out, max_t)
        tl.store(out + 1, max_s)
        tl.store(out + 2, tl.sum(sum_t.to(tl.float64), axis=0))
        tl.store(out + 3, tl.sum(sum_s.to(tl.float64), axis=0))
        tl.store(out + 4, tl.sum(mean.to(tl.float64), axis=0))
        tl.store(out + 5, tl.sum(difference.to(tl.float64), axis=0))


@triton.jit
def _gradient_kernel(
    student, student_stride, factor_s, teacher, teacher_stride, factor_t, out, out_stride,
    max_s, max_t, log_ratio, r_t, factor, NUM_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of one token: r_t factor (e_s ratio - e_t)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < NUM_COLUMNS
    scale = tl.load(factor + token)
    gradient = tl.zeros([COLUMNS], tl.float32)
    if scale != 0:
        y_s = _logits(student + token * student_stride, columns, inside, factor_s) - tl.load(max_s + token)
        y_t = _logits(teacher + token * teacher_stride, columns, inside, factor_t) - tl.load(max_t + token)
        shift = tl.load(log_ratio + token)
        x = y_s - y_t + shift
        e_t = tl.exp(y_t)
        parts = tl.where(tl.abs(x) < _SMALL, e_t * _expm1_of_small(x), tl.exp(y_s + shift) - e_t)
        gradient = tl.where(inside, parts * (tl.load(r_t + token) * scale), 0.0)
    tl.store(out + token * out_stride + columns, gradient.to(out.dtype.element_ty), mask=columns < WIDTH)
