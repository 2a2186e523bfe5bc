"""How long a GPU takes for a call, without what the CPU takes to launch it."""

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
