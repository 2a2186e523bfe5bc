"""A job whose last rank is asked to stop in the middle of a step."""

import os
import signal
from pathlib import Path

from megatron_qad.engine.events import Callback


class _AsksToStop(Callback):
    """SIGTERM to this rank, or a file, while a step runs; ``step`` counts this process's steps."""

    def __init__(self, step: int, file: str | None):
        self._step, self._file, self._steps = step, file, 0

    def step_begins(self, step, model):
        self._steps += 1
        if self._steps == self._step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            if self._file is None:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                Path(self._file).touch()


def train(argv: list[str], record: str, step: int, file: str | None = None) -> None:
    """``training_jobs.train``, with SIGTERM (or ``file``, made) while step number ``step`` runs on the last rank."""
    import training_jobs

    training_jobs.train(argv, record, callbacks=[_AsksToStop(step, file)])
