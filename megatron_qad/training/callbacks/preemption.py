"""A job that has to leave saves after the step it is in and exits with status 0.

It is asked by SIGTERM on any rank or by the file ``stop`` in ``--qad-job-dir``, which a batch script writes when its
time runs out: the warning of a scheduler reaches the script, not the ranks, and SIGUSR1 would end a torchrun agent. A
rank that sees the file sends itself SIGTERM; Megatron's signal handler, whose answers it gathers over all ranks after
each step, does the rest. Left out: what starts the job again (``launch/slurm.sbatch``).
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from megatron.training.global_vars import get_signal_handler

from megatron_qad.engine.events import Callback, TrainedStep

_FAILED = object()
_LOST = {
    "stepped": "until this file can be written, the batch script takes a crash for one before the first step",
    "stop": "requests to stop that come as a file are not seen meanwhile",
}
"""What it means that a file could not be written or looked for."""
_NOT_DONE = 75
"""Exit status of a rank that saved and could not say so: EX_TEMPFAIL."""


class Preemption(Callback):
    """Files in ``--qad-job-dir``, seen and written by one rank of each node, whose directories need not be the same:
    ``stop`` asks; ``stepped`` says that a step was completed since the start, so that a crash is worth another try;
    ``stopped`` that the job has saved and leaves because it was asked to.
    """

    def __init__(self, job):
        self._job = job
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        self._directory: Path | None = job.config.job_dir if speaks else None
        self._signal = job.args.exit_signal if job.args.exit_signal_handler else None
        self._is_asked = self._has_stepped = self._has_announced = False
        self._said: set[str] = set()

    def job_begins(self, job, resumes_at: int) -> None:
        if self._signal is None:
            return
        megatrons = signal.getsignal(self._signal)

        def handler(number, frame) -> None:
            self._is_asked = True
            megatrons(number, frame)

        signal.signal(self._signal, handler)

    def step_ended(self, step: TrainedStep) -> None:
        if self._directory is not None and not self._has_stepped:
            self._has_stepped = self._survive("stepped", Path.touch) is not _FAILED
        self._look()

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        self._look()  # between it and the end of the step Megatron asks the ranks

    def _look(self) -> None:
        if self._directory is not None and self._signal is not None and not self._is_asked:
            if self._survive("stop", Path.exists) is True:
                os.kill(os.getpid(), self._signal)
        if self._is_asked and not self._has_announced:
            self._has_announced = True
            print("megatron_qad: asked to stop; saving after this step", flush=True)

    def job_ends(self, is_done: bool) -> None:
        if is_done or self._signal is None or not any(get_signal_handler().signals_received()):
            return
        if self._directory is not None:
            self._job.loop.exit_status = self.say_stopped(self._directory)

    @staticmethod
    def say_stopped(directory: Path) -> int | None:
        """Status 0 without ``stopped`` is that of a job that is done: where the file cannot be written, the status that
        says it instead."""
        try:
            (directory / "stopped").touch()
        except OSError as error:
            print(
                f"megatron_qad: ERROR: --qad-job-dir: {error}. The job has saved and is not done: status {_NOT_DONE}",
                flush=True,
            )
            return _NOT_DONE
        return None

    def _survive(self, name: str, look: Callable[[Path], bool | None]) -> object:
        """``look`` at a file of the directory; a full disk or one that is away is said once and ends no job."""
        try:
            return look(self._directory / name)
        except OSError as error:
            if name not in self._said:
                self._said.add(name)
                print(f"megatron_qad: ERROR: --qad-job-dir: {error}. The job goes on; {_LOST[name]}", flush=True)
            return _FAILED
