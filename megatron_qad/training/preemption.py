"""A job that has to leave saves after the step it is in and exits with status 0.

It is asked by SIGTERM on any rank or by the file ``stop`` in ``--qad-job-dir``, which a batch script writes when its
time runs out: the warning of a scheduler reaches the script, not the ranks, and SIGUSR1 would end a torchrun agent.
Megatron's signal handler, whose answers it gathers over all ranks after each step, is the one seam; it learns to look
for the file. Left out: what starts the job again (``launch/slurm.sbatch``) and what it then finds (``resume``).
"""

import atexit
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

from megatron.training import global_vars, print_rank_0
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_qad.engine import QADError


def install(job_dir: str | None) -> None:
    """Let Megatron make its handler from ``StopRequests``. Before ``pretrain``, with ``--exit-signal-handler``."""
    directory = Path(job_dir) if job_dir else None
    if directory is not None and not directory.is_dir():
        raise QADError(f"--qad-job-dir {directory}: no such directory; the script that starts the job must make it")
    late: list[Path] = []
    global_vars.DistributedSignalHandler = functools.partial(StopRequests, directory, late=late)
    atexit.register(_write_late, late)
    atexit.register(_end_data_workers)


def _write_late(files: list[Path]) -> None:
    """Status 0 without ``stopped`` is that of a job that is done: where the file still cannot be written, the status
    says it."""
    try:
        for file in files:
            file.touch()
    except OSError as error:
        print(f"megatron_qad: ERROR: --qad-job-dir: {error}. The job has saved and is not done: status 75", flush=True)
        os._exit(75)  # EX_TEMPFAIL


def _end_data_workers() -> None:
    """Megatron lets data workers ignore SIGTERM, too. When a rank fails, multiprocessing sends it to them and waits for
    them, for ever; all other ranks wait for this one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each that is killed
    for worker in multiprocessing.active_children():
        worker.kill()


_FAILED = object()
_LOST = {
    "stepped": "until this file can be written, the batch script takes a crash for one before the first step",
    "stop": "requests to stop that come as a file are not seen meanwhile",
    "stopped": "the file, which says that it leaves because it was asked to, is tried again when it has saved",
}
"""What it means that a file could not be written or looked for."""


class StopRequests(DistributedSignalHandler):
    """Megatron asks this after every step, on every rank; one rank that was asked to stop stops all.

    Files in ``directory``, seen and written by one rank of each node, whose directories need not be the same: ``stop``
    asks; ``stepped`` says that a step was completed since the start, so that a crash is worth another try; ``stopped``
    that the job leaves because it was asked to.
    """

    def __init__(self, directory: Path | None, sig: signal.Signals, late: list[Path]):
        super().__init__(sig)
        self._directory, self._late = directory, late
        self._has_stepped = False
        self._said: set[str] = set()

    def signals_received(self) -> list[int]:
        speaks = self._directory is not None and os.environ.get("LOCAL_RANK", "0") == "0"
        if speaks:
            if not self._has_stepped:
                self._has_stepped = self._survive("stepped", Path.touch) is not _FAILED
            self._signal_received |= self._survive("stop", Path.exists) is True
        received = super().signals_received()
        if any(received):
            print_rank_0("megatron_qad: asked to stop; saving after this step")
            if speaks and self._survive("stopped", Path.touch) is _FAILED:
                self._late.append(self._directory / "stopped")
        return received

    def _survive(self, name: str, look: Callable[[Path], bool | None]) -> object:
        """``look`` at a file of the directory; a full disk or one that is away is said once and ends no job."""
        try:
            return look(self._directory / name)
        except OSError as error:
            if name not in self._said:
                self._said.add(name)
                print(f"megatron_qad: ERROR: --qad-job-dir: {error}. The job goes on; {_LOST[name]}", flush=True)
            return _FAILED
