"""The stages of ``megatron-qad run``, and what runs them: as processes, each once, with their output shown.

A stage that has ended is recorded with its command line in log/NAME.done. The same ``megatron-qad run`` again skips it.
A stage whose command line has changed runs again, and so do those after it.
"""

import contextlib
import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_qad.cli import launcher
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.processes import end_with_parent
from megatron_qad.engine.system_errors import naming

STAGES: Mapping[str, str] = {
    "prepare": "prepare",
    "import": "import",
    "plan": "train",  # with --qad-dry-run
    "ptq": "ptq",
    "qad": "train",
    "select": "select",
    "export": "export",
    "validate": "validate",
    "report": "report",
}
"""Name of each stage -> its command, in order. launch/pipeline.sbatch has the same names where it has the same stage;
tests/unit/cli/test_stages.py compares them, and docs/decisions/launching_and_slurm.md says why there are two."""
STOPPED = 75
"""Exit status of a run that was stopped and can be continued (EX_TEMPFAIL), as of launch/slurm.sbatch."""


class Stages:
    """The stages of one run, which share a directory.

    Args:
        log: directory for the output of each stage, and for the records of those that have ended.
        num_ranks: ranks of the stages that run on all GPUs.
    """

    def __init__(self, log: Path, num_ranks: int):
        self._log = log
        self._num_ranks = num_ranks
        self._begin = time.monotonic()
        self._has_changed = False
        self._child: subprocess.Popen | None = None
        self._stop_signal: int | None = None
        with naming(log):
            log.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.monotonic() - self._begin:5.0f} s] {text}", flush=True)

    def run(
        self,
        name: str,
        flags: Sequence[str | Path],
        *,
        on_all_gpus: bool | None = None,
        until: Callable[[], bool] = lambda: True,
    ) -> None:
        """Run the command of a stage, unless it has ended before with the same flags.

        Args:
            name: name of the stage, a key of ``STAGES``.
            flags: the command's flags.
            on_all_gpus: whether it has one rank for each GPU; None means as the table of commands says.
            until: called after the command. If it returns False, the command was stopped early.

        Raises:
            QADError: the command failed; its output says why.
            SystemExit: the command was stopped and has saved its state; the status is ``STOPPED``.
        """
        command, words = STAGES[name], [str(flag) for flag in flags]
        done = self._log / f"{name}.done"
        record = json.dumps([command, *words])
        if not self._has_changed and done.is_file() and done.read_text() == record:
            return self.say(f"{name}: done before")
        self._has_changed = True
        done.unlink(missing_ok=True)
        log = self._log / f"{name}.txt"
        self.say(f"{name} (log: {log})")
        status = self._execute([*launcher.command_line(command, on_all_gpus=on_all_gpus), *words], log)
        if self._stop_signal is not None or (status == 0 and not until()):
            self.say(f"{name} was stopped. The same command continues from here.")
            sys.exit(STOPPED)
        if status:
            raise QADError(
                f"{name}: ended with status {status}; its output is above and in {log}. Start the same command again "
                "after the cause is removed; finished stages are skipped."
            )
        done.write_text(record)

    def _execute(self, words: list[str], log: Path) -> int:
        """Run a process whose output goes to the terminal and to a file. It ends with this process."""
        environ = launcher.environment(self._num_ranks)
        parent = os.getpid()
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            # On a terminal the stage gets one, too, so that it shows progress bars.
            output, end = pty.openpty() if sys.stdout.isatty() else os.pipe()
            with open(log, "ab") as file, naming(log), os.fdopen(output, "rb", buffering=0):
                self._child = subprocess.Popen(
                    words, env=environ, stdout=end, stderr=end, preexec_fn=lambda: end_with_parent(parent)
                )
                os.close(end)
                while chunk := _read(output):
                    file.write(chunk)
                    file.flush()
                    with contextlib.suppress(BrokenPipeError):
                        sys.stdout.buffer.write(chunk)
                        sys.stdout.buffer.flush()
                return self._child.wait()
        finally:
            self._child = None
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: object) -> None:
        """Pass a request to stop on to the stage: training saves and ends."""
        self._stop_signal = number
        if self._child is not None:
            self._child.send_signal(number)


def _read(descriptor: int) -> bytes:
    """Return what a stage has written; empty at its end, which a terminal reports as an error."""
    try:
        return os.read(descriptor, 1 << 16)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""
