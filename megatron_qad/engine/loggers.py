"""Loggers that never end a job: TensorBoard's event files, wandb, Megatron's progress log and the console.

What a logger raises is said once per kind of failure, on one line, and the job goes on. ``Loggers`` puts all of it in
Megatron's place; ``event_writer`` is TensorBoard's part. Left out: the small files of the job itself, which
``engine.run_directory.manifest.write_or_warn`` and ``preemption`` survive.
"""

import argparse
import atexit
import secrets
import sys
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
    """``wandb``, whose functions (also those of its ``run`` and ``config``) raise nothing and then return None."""

    def __init__(self, guarded, failures: FailureLog):
        self._guarded, self._failures = guarded, failures

    def __getattr__(self, name: str):
        try:
            value = getattr(self._guarded, name)
        except Exception as error:
            self._failures.report(error)
            return None
        if callable(value):
            return _surviving(value, self._failures)
        return value if isinstance(value, (str, int, float, type(None))) else Guarded(value, self._failures)

    def __eq__(self, other) -> bool:  # Megatron's timers ask whether their writer is wandb
        return other is self._guarded or isinstance(other, Guarded) and other._guarded is self._guarded

    __hash__ = object.__hash__


def _surviving(function: Callable, failures: FailureLog, errors: type[Exception] = Exception) -> Callable:
    def call(*args, **named):
        try:
            return function(*args, **named)
        except errors as error:
            failures.report(error)
            return None

    return call


class _Console:
    """stdout or stderr, of which a full disk or a closed pipe behind it loses text and not the job."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)  # there is no place left to say it

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            return


class Loggers:
    """A job's loggers. ``install`` comes before Megatron parses its flags, which starts them.

    Args:
        save: ``--save``.
        tensorboard_dir: ``--tensorboard-dir``.
        wandb_dir: where wandb keeps its files.
    """

    def __init__(self, save: str | None, tensorboard_dir: str | None, wandb_dir: str):
        self._save, self._tensorboard_dir, self._wandb_dir = save, tensorboard_dir, wandb_dir

    def install(self) -> None:
        """Let Megatron make its loggers from those of this file."""
        sys.stdout, sys.stderr = (s if isinstance(s, _Console) else _Console(s) for s in (sys.stdout, sys.stderr))
        replace("megatron.training.global_vars:_set_tensorboard_writer", lambda _: self._set_tensorboard_writer)
        of_wandb = FailureLog(f"wandb in {self._wandb_dir}")

        def guarded(start: Callable) -> Callable:
            def set_wandb_writer(args: argparse.Namespace) -> None:
                _surviving(start, of_wandb)(args)
                if (wandb := global_vars.get_wandb_writer()) is not None:
                    global_vars._GLOBAL_WANDB_WRITER = Guarded(wandb, of_wandb)

            return set_wandb_writer

        replace("megatron.training.global_vars:_set_wandb_writer", guarded)
        # A checkpoint's entry in wandb, and a small file beside the checkpoints.
        surviving_wandb = partial(_surviving, failures=of_wandb)
        replace("megatron.training.wandb_utils:on_save_checkpoint_success", surviving_wandb)
        surviving_disk = partial(_surviving, failures=FailureLog(f"the progress log in {self._save}"), errors=OSError)
        for module in ("training", "checkpointing"):
            replace(f"megatron.training.{module}:append_to_progress_log", surviving_disk)

    def event_record(self) -> Callable[[], str] | None:
        """What every checkpoint is to say of the event files (``event_record``); None where there are none."""
        if not self._tensorboard_dir or self._save is None:
            return None
        return EventRecord(Path(self._tensorboard_dir), Path(self._save)).text

    def _set_tensorboard_writer(self, args: argparse.Namespace) -> None:
        if args.tensorboard_dir and args.rank == args.world_size - 1:
            print("> setting tensorboard ...")
            global_vars._GLOBAL_TENSORBOARD_WRITER = JobWriter(
                args.tensorboard_dir,
                args.tensorboard_queue_size,
                lambda: getattr(args, "iteration", 0),
                Path(args.save) / EVENTS_FILE if args.save is not None else None,
            )
            atexit.register(self.close)

    def close(self) -> None:
        """Write what TensorBoard's thread has not yet written, and beside the checkpoints what the event files now
        are."""
        writer = global_vars.get_tensorboard_writer()
        if not isinstance(writer, JobWriter) or writer.file_writer is None:
            return
        writer.close()
        if self._save is not None and Path(self._save).is_dir():
            record = EventRecord(Path(self._tensorboard_dir), Path(self._save))
            manifest.write_or_warn(Path(self._save) / EVENTS_FILE, record.text())


def continue_wandb_run(project: str | None, save: str | None, environ: MutableMapping[str, str]) -> None:
    """Give every start of one ``--save`` directory the same wandb run. ``WANDB_RUN_ID``, if set, wins.

    Only on the last rank, the one that Megatron lets write, and before Megatron parses, which starts the run.
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
        print(f"megatron_qad: ERROR: {file}: {error}. This start is a wandb run of its own", flush=True)
    else:
        if not name:  # no file, or one that a full disk left empty
            name = environ.get("WANDB_RUN_ID", secrets.token_hex(4))
            manifest.write_or_warn(file, name)  # else the next start is a wandb run of its own
    environ.setdefault("WANDB_RUN_ID", name or secrets.token_hex(4))
    environ.setdefault("WANDB_RESUME", "allow")
