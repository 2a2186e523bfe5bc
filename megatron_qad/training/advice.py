"""Advice after a validation: whether the KL still falls by more than its noise, in one line. It never stops a job.

NVIDIA's recipe for QAD (modelopt's skill): evaluate at iteration 150 and then every 100; stop when the gap to the
teacher is below 1 %, when the model gets worse, or when loss and benchmarks no longer change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_BENCHMARK, BETWEEN_BENCHMARKS = 150, 100
"""Iterations at which NVIDIA's recipe evaluates benchmarks."""
SMALL_GAP = 0.01
CHANGE_NOISE = "advice/kl_change_noise"
"""Name of ``Measured.noise`` among the metrics."""


@dataclass(frozen=True)
class Measured:
    """One validation."""

    iteration: int
    kl: float
    """Mean KL to the teacher, in nats per token."""
    teacher_cross_entropy: float
    """Of the text's tokens, in nats per token."""
    noise: float | None = None
    """Half of the 95 % interval of the change of ``kl`` since the validation before, paired by microbatch, in nats.
    None if it is unknown: for the first validation of a start, or with one microbatch."""


def advice(history: Sequence[Measured]) -> str:
    """Return one line about the last validation of a run, from all of them in order.

    Example:
        >>> advice([Measured(100, 0.20, 2.0), Measured(200, 0.17, 2.0, noise=0.002)])
        'KL fell by 15.0 % since iteration 100, more than its noise of 1.0 %: continue'
    """
    last = history[-1]
    if not math.isfinite(last.kl):
        return "KL is not finite: stop and look for the cause (docs/failure_modes.md)"
    parts = [_trend(history)]
    gap = last.kl / last.teacher_cross_entropy if last.teacher_cross_entropy > 0 else math.inf
    if gap < SMALL_GAP:
        parts.append(
            f"KL is {gap:.2%} of the teacher's cross entropy, below {SMALL_GAP:.0%}: benchmark it, consider stopping"
        )
    elif (due := _benchmark_due(history)) is not None:
        parts.append(f"iteration {due} is reached: benchmark a checkpoint")
    return "; ".join(part.replace("%", " %").replace("  %", " %") for part in parts)


def _trend(history: Sequence[Measured]) -> str:
    last = history[-1]
    if len(history) < 2 or not (math.isfinite(history[-2].kl) and history[-2].kl > 0):
        return "first validation: nothing to compare with"
    before = history[-2]
    change = last.kl - before.kl
    relative = f"{abs(change) / before.kl:.1%} since iteration {before.iteration}"
    verb = "fell" if change < 0 else "rose"
    if last.noise is None:
        return f"KL {verb} by {relative}; its noise is unknown, because the job was started again or has one microbatch"
    noise = f"its noise of {last.noise / before.kl:.1%}"
    if change < -last.noise:
        return f"KL {verb} by {relative}, more than {noise}: continue"
    if change > last.noise:
        return f"KL {verb} by {relative}, more than {noise}: the model gets worse; consider stopping or a lower rate"
    flat = _num_flat(history)
    if flat < 2:
        return f"KL {verb} by {relative}, within {noise}"
    return f"KL {verb} by {relative}; flat within {noise} for {flat} validations: consider stopping"


def _num_flat(history: Sequence[Measured]) -> int:
    """Return the number of validations at the end whose change is within its noise."""
    number = 0
    for before, after in zip(reversed(history[:-1]), reversed(history), strict=False):
        if after.noise is None or abs(after.kl - before.kl) > after.noise:
            break
        number += 1
    return number


def _benchmark_due(history: Sequence[Measured]) -> int | None:
    """Return the iteration of the recipe that was reached since the validation before."""
    last, before = history[-1].iteration, history[-2].iteration if len(history) > 1 else 0
    if last < FIRST_BENCHMARK:
        return None
    due = last - (last - FIRST_BENCHMARK) % BETWEEN_BENCHMARKS
    return due if due > before else None
