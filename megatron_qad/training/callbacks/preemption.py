"""Preemption: a job that is asked to stop saves after the current step and exits with status 0.

The request is SIGTERM or SIGUSR1 on any rank, or a file ``stop`` in ``--qad-job-dir``, which a batch script writes when
its time runs out: a scheduler's warning may reach the script but not the ranks. A rank that sees the file or SIGUSR1
sends itself SIGTERM. Megatron checks its signal handler on all ranks after each step, saves and
exits. ``launch/slurm.sbatch`` restarts the job.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from megatron.training.global_vars import get_signal_handler

from megatron_qad.engine.events import Callback, TrainedStep

_FAILED = object()
_CONSEQUENCES = {
    "stepped": "until this file can be written, the batch script treats a crash as one before the first step",
    "stop": "while the directory cannot be read, a file 'stop' in it is not seen",
}
"""Consequence of a failure to write or look for a file, by its name."""
_NOT_DONE = 75
"""Exit status of a rank that has saved but could not write ``stopped``: EX_TEMPFAIL."""


class Preemption(Callback):
    """Reads and writes files in ``--qad-job-dir`` on one rank per node; nodes may have different directories.

    ``stop`` asks the job to stop. ``stepped`` means that a step was completed since the start, so that a restart after
    a crash is worth trying. ``stopped`` means that the job has saved and exits because it was asked to.
    """

    def __init__(self, job):
        self._job = job
        is_first_on_node = os.environ.get("LOCAL_RANK", "0") == "0"
        self._directory: Path | None = job.config.job_dir if is_first_on_node else None
        self._signal = job.args.exit_signal if job.args.exit_signal_handler else None
        self._must_stop = self._has_stepped = self._has_announced = False
        self._logged_failures: set[str] = set()

    def job_begins(self, job, resumes_at: int) -> None:
        if self._signal is None:
            return
        megatron_handler = signal.getsignal(self._signal)

        def handler(number, frame) -> None:
            self._must_stop = True
            megatron_handler(number, frame)

        signal.signal(self._signal, handler)
        if self._signal != signal.SIGUSR1:  # reaches the ranks by scancel --signal=USR1, if srun started them
            signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), self._signal))

    def step_ended(self, step: TrainedStep) -> None:
        if self._directory is not None and not self._has_stepped:
            self._has_stepped = self._try("stepped", Path.touch) is not _FAILED
        self._check_for_stop()

    def evaluation_ended(self, iteration: int, means: dict[str, float]) -> None:
        self._check_for_stop()  # Megatron checks the signal between an evaluation and the end of the step

    def _check_for_stop(self) -> None:
        if self._directory is not None and self._signal is not None and not self._must_stop:
            if self._try("stop", Path.exists) is True:
                os.kill(os.getpid(), self._signal)
        if self._must_stop and not self._has_announced:
            self._has_announced = True
            print("megatron_qad: asked to stop; saving after this step", flush=True)

    def job_ends(self, is_done: bool) -> None:
        if is_done or self._signal is None or not any(get_signal_handler().signals_received()):
            return
        if self._directory is not None:
            self._job.loop.exit_status = self.write_stopped(self._directory)

    @staticmethod
    def write_stopped(directory: Path) -> int | None:
        """Write the file ``stopped``. Returns an exit status if that fails: 0 would mean that the job is done."""
        try:
            (directory / "stopped").touch()
        except OSError as error:
            print(
                f"megatron_qad: ERROR: --qad-job-dir: {error}. The job has saved but is not done: status {_NOT_DONE}",
                flush=True,
            )
            return _NOT_DONE
        return None

    def _try(self, name: str, action: Callable[[Path], bool | None]) -> object:
        """Call ``action`` on a file of the directory. A failure (full or missing disk) is logged once, not raised."""
        try:
            return action(self._directory / name)
        except OSError as error:
            if name not in self._logged_failures:
                self._logged_failures.add(name)
                consequence = _CONSEQUENCES[name]
                print(f"megatron_qad: ERROR: --qad-job-dir: {error}. The job continues; {consequence}", flush=True)
            return _FAILED
