"""A job whose last rank is asked to stop in the middle of a step."""

import os
import signal
from pathlib import Path


def train(argv: list[str], record: str, step: int, file: str | None = None) -> None:
    """``training_jobs.train``, with SIGTERM (or ``file``, made) while step number ``step`` runs on the last rank."""
    import training_jobs
    from megatron.training import training as megatron_loop

    train_step, steps = megatron_loop.train_step, 0

    def asked_meanwhile(*args, **kwargs):
        nonlocal steps
        steps += 1
        if steps == step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            if file is None:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                Path(file).touch()
        return train_step(*args, **kwargs)

    megatron_loop.train_step = asked_meanwhile
    training_jobs.train(argv, record)
