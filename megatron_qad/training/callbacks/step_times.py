"""Logs the step time of each rank at every log interval, next to Megatron's output (``engine.console``).

Ranks wait for each other, so a step takes the same time on all of them. A slow rank shows in the wait between the end
of its own passes and the end of the gradient reduction: the rank that all others wait for has the shortest wait. On a
GPU the times are measured by stream events, without synchronization. Not measured: waits within the passes, for tensor
and pipeline parallelism.
"""

import socket
import time

import torch
from megatron.training import is_last_rank

from megatron_qad.engine import capabilities
from megatron_qad.engine.events import Callback, TrainedStep, Update


class StepTimes(Callback):
    """Measures the step time and the wait for the gradients on this rank."""

    def __init__(self, job):
        self._log_interval, self._output = job.args.log_interval, job.output
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._passes_ended: list = []

    def step_begins(self, step: int, model) -> None:
        self._began = time.perf_counter()
        self._passes_ended = []

    def gradients_begin(self) -> None:
        self._passes_ended = [_now()]

    def before_update(self, update: Update) -> None:
        if self._passes_ended:
            self._waits.append(_seconds_since(self._passes_ended.pop()))

    def step_ended(self, step: TrainedStep) -> None:
        self._steps.append(time.perf_counter() - self._began)
        if step.number % self._log_interval:
            return
        size = torch.distributed.get_world_size()
        if size > 1 and self._waits:
            local = (_mean(self._steps), _mean(self._waits), socket.gethostname())
            ranks: list = [None] * size
            torch.distributed.all_gather_object(ranks, local)
            if is_last_rank():
                self._output.log_line(_format_line(step.number, len(self._steps), ranks))
        self._steps, self._waits = [], []


def _now():
    if capabilities().device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_since(moment) -> float:
    now = _now()
    if isinstance(moment, float):
        return now - moment
    now.synchronize()
    return moment.elapsed_time(now) / 1000


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _format_line(step: int, num_steps: int, ranks: list[tuple[float, float, str]]) -> str:
    """Format one log line with the slowest rank and the rank that the others wait for.

    Args:
        ranks: mean step time, mean wait and host name of each rank.
    """
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank][0])
    awaited = min(range(len(ranks)), key=lambda rank: ranks[rank][1])
    waits = sorted(wait for _, wait, _ in ranks)
    return " | ".join(
        (
            f" megatron_qad step times at iteration {step}",
            f"mean of the last {num_steps}",
            f"slowest: rank {slowest} on {ranks[slowest][2]}, {ranks[slowest][0]:.4g} s",
            f"fastest: {min(seconds for seconds, _, _ in ranks):.4g} s",
            f"waited for: rank {awaited} on {ranks[awaited][2]} (its own wait: {ranks[awaited][1]:.4g} s)",
            f"median wait: {waits[len(waits) // 2]:.4g} s",
        )
    )
