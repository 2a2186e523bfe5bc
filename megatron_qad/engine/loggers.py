"""Loggers that never end a job: TensorBoard event files, wandb and Megatron's progress log.

Each kind of failure of a logger is printed once, on one line, and the job continues. ``Loggers`` replaces Megatron's
loggers; ``event_writer`` implements TensorBoard's, and ``console`` guards the terminal. Failures of the job's own small
files are handled by ``engine.run_directory.manifest.write_or_warn`` and ``preemption``.
"""

import argparse
import atexit
import secrets
from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path

from megatron.training import global_vars

from megatron_qad.engine.event_record import EventRecord
from megatron_qad.engine.event_writer import FailureLog, JobWriter
from megatron_qad.engine.patches import replace
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.run_files import EVENTS_FILE


class Guarded:
    """A proxy of ``wandb`` whose functions, including those of its ``run`` and ``config``, return None on an error."""

    def __init__(self, guarded, failures: FailureLog):
        self._guarded, self._failures = guarded, failures

    def __getattr__(self, name: str):
        try:
            value = getattr(self._guarded, name)
        except Exception as error:
            self._failures.report(error)
            return None
        if callable(value):
            return _never_raise(value, self._failures)
        return value if isinstance(value, (str, int, float, type(None))) else Guarded(value, self._failures)

    def __eq__(self, other) -> bool:  # Megatron's timers check whether their writer is wandb
        return other is self._guarded or isinstance(other, Guarded) and other._guarded is self._guarded

    __hash__ = object.__hash__


def _never_raise(function: Callable, failures: FailureLog, errors: type[Exception] = Exception) -> Callable:
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except errors as error:
            failures.report(error)
            return None

    return call


class Loggers:
    """The loggers of a job. Call ``install`` before Megatron parses its flags, because parsing starts the loggers.

    Args:
        save: ``--save``.
        tensorboard_dir: ``--tensorboard-dir``.
        wandb_dir: directory of wandb's files.
    """

    def __init__(self, save: str | None, tensorboard_dir: str | None, wandb_dir: str):
        self._save, self._tensorboard_dir, self._wandb_dir = save, tensorboard_dir, wandb_dir

    def install(self) -> None:
        """Replace Megatron's loggers by those of this module."""
        replace("megatron.training.global_vars:_set_tensorboard_writer", lambda _: self._set_tensorboard_writer)
        wandb_failures = FailureLog(f"wandb in {self._wandb_dir}")

        def guard(start: Callable) -> Callable:
            def set_wandb_writer(args: argparse.Namespace) -> None:
                _never_raise(start, wandb_failures)(args)
                if (wandb := global_vars.get_wandb_writer()) is not None:
                    global_vars._GLOBAL_WANDB_WRITER = Guarded(wandb, wandb_failures)

            return set_wandb_writer

        replace("megatron.training.global_vars:_set_wandb_writer", guard)
        # Logs a checkpoint to wandb and writes a small file next to the checkpoints.
        guard_wandb = partial(_never_raise, failures=wandb_failures)
        replace("megatron.training.wandb_utils:on_save_checkpoint_success", guard_wandb)
        guard_disk = partial(_never_raise, failures=FailureLog(f"the progress log in {self._save}"), errors=OSError)
        for module in ("training", "checkpointing"):
            replace(f"megatron.training.{module}:append_to_progress_log", guard_disk)

    def event_record(self) -> Callable[[], str] | None:
        """Return a function for the record of the event files (``event_record``); None if there are no such files."""
        if not self._tensorboard_dir or self._save is None:
            return None
        return EventRecord(Path(self._tensorboard_dir), Path(self._save)).text

    def _set_tensorboard_writer(self, args: argparse.Namespace) -> None:
        if args.tensorboard_dir and args.rank == args.world_size - 1:
            global_vars._GLOBAL_TENSORBOARD_WRITER = JobWriter(
                args.tensorboard_dir,
                args.tensorboard_queue_size,
                lambda: getattr(args, "iteration", 0),
                Path(args.save) / EVENTS_FILE if args.save is not None else None,
            )
            atexit.register(self.close)

    def close(self) -> None:
        """Write pending TensorBoard events, and the record of the final event files in the run directory."""
        writer = global_vars.get_tensorboard_writer()
        if not isinstance(writer, JobWriter) or writer.file_writer is None:
            return
        writer.close()
        if self._save is not None and Path(self._save).is_dir():
            record = EventRecord(Path(self._tensorboard_dir), Path(self._save))
            manifest.write_or_warn(Path(self._save) / EVENTS_FILE, record.text())


def continue_wandb_run(project: str | None, save: str | None, environ: MutableMapping[str, str]) -> None:
    """Give every start with the same ``--save`` directory the same wandb run. ``WANDB_RUN_ID`` takes precedence.

    Does nothing except on the last rank, where Megatron logs to wandb. Must run before Megatron parses its flags, which
    starts the wandb run.
    """
    is_last = int(environ.get("RANK", "0")) == int(environ.get("WORLD_SIZE", "1")) - 1
    if not project or save is None or not is_last:
        return
    file = Path(save) / "wandb_run_id.txt"
    name = ""
    try:
        name = file.read_text().strip() if file.is_file() else ""
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"megatron_qad: ERROR: {file}: {error}. This start is logged as a new wandb run.", flush=True)
    else:
        if not name:  # no file, or an empty one after a full disk
            name = environ.get("WANDB_RUN_ID", secrets.token_hex(4))
            manifest.write_or_warn(file, name)  # if it fails, the next start is a new wandb run
    environ.setdefault("WANDB_RUN_ID", name or secrets.token_hex(4))
    environ.setdefault("WANDB_RESUME", "allow")
