"""A job whose last rank receives a stop request in the middle of a step."""

import os
import signal
from pathlib import Path

from megatron_qad.engine.events import Callback


class _RequestStop(Callback):
    """Sends SIGUSR1 to this rank, or creates a file, during a step; ``step`` counts the steps of this process."""

    def __init__(self, step: int, file: str | None):
        self._step, self._file, self._num_steps = step, file, 0

    def step_begins(self, step, model):
        self._num_steps += 1
        if self._num_steps == self._step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            if self._file is None:
                os.kill(os.getpid(), signal.SIGUSR1)  # the job sends itself SIGTERM
            else:
                Path(self._file).touch()


def train(argv: list[str], record: str, step: int, file: str | None = None) -> None:
    """``training_jobs.train`` with SIGUSR1 on the last rank, or the creation of ``file``, during step ``step``."""
    import training_jobs

    training_jobs.train(argv, record, callbacks=[_RequestStop(step, file)])
