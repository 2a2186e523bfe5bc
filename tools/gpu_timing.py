"""How long a GPU takes for a call, without what the CPU takes to launch it; and how long a call takes elsewhere."""

import statistics
import time
from collections.abc import Callable

import torch


def gpu_seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds between events around the call behind a filled queue, as in a training step, and of its launches alone.

    Calls that launch for longer than about 20 ms outlast the filling.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(40_000_000)  # cycles
    start.record()
    began = time.perf_counter()
    call()
    host = time.perf_counter() - began
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, host


def call_seconds(
    call: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float | None]:
    """``gpu_seconds`` where torch finds a GPU; elsewhere the seconds of the call by ``clock``, and None."""
    if torch.cuda.is_available():
        return gpu_seconds(call)
    start = clock()
    call()
    return clock() - start, None


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of ``repeats`` calls after three untimed ones, which compile and fault memory in."""
    for _ in range(3):
        call()
    return statistics.median(call_seconds(call)[0] for _ in range(repeats))
