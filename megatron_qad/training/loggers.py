"""Loggers that never end a job: TensorBoard's event files, wandb, Megatron's progress log and the console.

What a logger raises is said once per kind of fault, on one line, and the job goes on. ``install`` puts all of it in
Megatron's place; ``event_writer`` is TensorBoard's part. Left out: the small files of the job itself, which
``engine.run_directory.manifest.write_or_say`` and ``preemption`` survive.
"""

import argparse
import atexit
import sys
from collections.abc import Callable
from pathlib import Path

from megatron.training import checkpointing, get_args, global_vars, wandb_utils
from megatron.training import training as megatron_loop

from megatron_qad.engine import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.run_files import EVENTS_FILE
from megatron_qad.training.event_record import EventRecord
from megatron_qad.training.event_writer import Faults, JobWriter


def _set_tensorboard_writer(args: argparse.Namespace) -> None:
    if args.tensorboard_dir and args.rank == args.world_size - 1:
        print("> setting tensorboard ...")
        global_vars._GLOBAL_TENSORBOARD_WRITER = JobWriter(
            args.tensorboard_dir,
            args.tensorboard_queue_size,
            lambda: getattr(get_args(), "iteration", 0),
            Path(args.save) / EVENTS_FILE if args.save is not None else None,
        )
        atexit.register(close)


def close() -> None:
    """Write what TensorBoard's thread has not yet written, and beside the checkpoints what the event files now are."""
    writer, args = global_vars.get_tensorboard_writer(), global_vars._GLOBAL_ARGS
    if not isinstance(writer, JobWriter) or writer.file_writer is None:
        return
    writer.close()
    if args is not None and args.save is not None and Path(args.save).is_dir():
        record = EventRecord(Path(args.tensorboard_dir), Path(args.save))
        manifest.write_or_say(Path(args.save) / EVENTS_FILE, record.text())


class Guarded:
    """``wandb``, whose functions (also those of its ``run`` and ``config``) raise nothing and then return None."""

    def __init__(self, guarded, faults: Faults):
        self._guarded, self._faults = guarded, faults

    def __getattr__(self, name: str):
        try:
            value = getattr(self._guarded, name)
        except Exception as error:
            self._faults.say(error)
            return None
        if callable(value):
            return _surviving(value, self._faults)
        return value if isinstance(value, (str, int, float, type(None))) else Guarded(value, self._faults)

    def __eq__(self, other) -> bool:  # Megatron's timers ask whether their writer is wandb
        return other is self._guarded or isinstance(other, Guarded) and other._guarded is self._guarded

    __hash__ = object.__hash__


def _surviving(function: Callable, faults: Faults, errors: type[Exception] = Exception) -> Callable:
    def call(*args, **named):
        try:
            return function(*args, **named)
        except errors as error:
            faults.say(error)
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


def install(early: argparse.Namespace) -> None:
    """Let Megatron make its loggers from those above. Once a process, before it parses, which starts them.

    Raises:
        QADError: flags by which wandb could not be started.
    """
    if early.wandb_project and early.wandb_exp_name == "":
        raise QADError("--wandb-exp-name '': expected the run's name in wandb, or no such flag")
    if early.wandb_project and early.save is None and not early.wandb_save_dir:
        raise QADError("--wandb-project needs a directory for wandb's files: give --save or --wandb-save-dir")
    sys.stdout, sys.stderr = (s if isinstance(s, _Console) else _Console(s) for s in (sys.stdout, sys.stderr))
    global_vars._set_tensorboard_writer = _set_tensorboard_writer
    faults = Faults(f"wandb in {early.wandb_save_dir or f'{early.save}/wandb'}")
    start = _surviving(global_vars._set_wandb_writer, faults)

    def set_wandb_writer(args: argparse.Namespace) -> None:
        start(args)
        if (wandb := global_vars.get_wandb_writer()) is not None:
            global_vars._GLOBAL_WANDB_WRITER = Guarded(wandb, faults)

    global_vars._set_wandb_writer = set_wandb_writer
    # A checkpoint's entry in wandb, and a small file beside the checkpoints.
    wandb_utils.on_save_checkpoint_success = _surviving(wandb_utils.on_save_checkpoint_success, faults)
    progress = Faults(f"the progress log in {early.save}")
    for module in (megatron_loop, checkpointing):
        module.append_to_progress_log = _surviving(module.append_to_progress_log, progress, OSError)
