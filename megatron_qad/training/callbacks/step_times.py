"""How long each rank takes, at every log interval.

Ranks wait for each other, so the whole step takes all of them the same time. What tells a slow one is the wait between
the end of its own passes and the moment when all gradients are agreed on: the one that everybody waits for waits least.
On a GPU the times are those of its stream, so that nothing is synchronized for them. Left out: waits within the passes,
of tensor and pipeline parallelism.
"""

import socket
import time

import torch
from megatron.training.utils import print_rank_last

from megatron_qad.engine import capabilities
from megatron_qad.engine.events import Callback, TrainedStep, Update


class StepTimes(Callback):
    def __init__(self, job):
        self._log_interval = job.args.log_interval
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._arrived: list = []

    def step_begins(self, step: int, model) -> None:
        self._began = time.perf_counter()
        self._arrived = []

    def gradients_begin(self) -> None:
        self._arrived = [_now()]

    def before_update(self, update: Update) -> None:
        if self._arrived:
            self._waits.append(_seconds_since(self._arrived.pop()))

    def step_ended(self, step: TrainedStep) -> None:
        self._steps.append(time.perf_counter() - self._began)
        if step.number % self._log_interval:
            return
        size = torch.distributed.get_world_size()
        if size > 1 and self._waits:
            mine = (_mean(self._steps), _mean(self._waits), socket.gethostname())
            ranks: list = [None] * size
            torch.distributed.all_gather_object(ranks, mine)
            print_rank_last(_line(step.number, len(self._steps), ranks))
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


def _line(step: int, number: int, ranks: list[tuple[float, float, str]]) -> str:
    """One line for any number of ranks: the slowest, and the one that the others wait for."""
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank][0])
    awaited = min(range(len(ranks)), key=lambda rank: ranks[rank][1])
    waits = sorted(wait for _, wait, _ in ranks)
    return " | ".join(
        (
            f" megatron_qad step times at iteration {step}",
            f"mean of the last {number}",
            f"slowest: rank {slowest} on {ranks[slowest][2]}, {ranks[slowest][0]:.4g} s",
            f"fastest: {min(one[0] for one in ranks):.4g} s",
            f"waited for: rank {awaited} on {ranks[awaited][2]}, which waits {ranks[awaited][1]:.4g} s",
            f"the median rank: {waits[len(waits) // 2]:.4g} s",
        )
    )
