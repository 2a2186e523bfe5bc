"""Timing of calls: on a GPU without the CPU's launch time, elsewhere by a clock."""

import statistics
import time
from collections.abc import Callable

import torch


def gpu_seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return the GPU seconds of a call, and the CPU seconds of its launches.

    The GPU's queue is filled first, as in a training step, so that launch time does not count. Calls whose launches
    take longer than about 20 ms outlast the filled queue.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(40_000_000)  # cycles
    start.record()
    host_start = time.perf_counter()
    call()
    host = time.perf_counter() - host_start
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, host


def call_seconds(
    call: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float | None]:
    """Return ``gpu_seconds`` if PyTorch finds a GPU, else the seconds of the call by ``clock`` and None."""
    if torch.cuda.is_available():
        return gpu_seconds(call)
    start = clock()
    call()
    return clock() - start, None


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of ``repeats`` calls, after three untimed calls that compile and touch memory."""
    for _ in range(3):
        call()
    return statistics.median(call_seconds(call)[0] for _ in range(repeats))
