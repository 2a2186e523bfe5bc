"""Loggers that never end a job: TensorBoard's event files, wandb, Megatron's progress log and the console.

What a logger raises is said once per kind of fault, on one line, and the job goes on. Scalars that cannot be written
to an event file wait in memory and are written when there is room again. ``install`` puts all of it in Megatron's
place. Left out: the small files of the job itself, which ``runtime.manifest.write_or_say`` and ``preemption`` survive.
"""

import argparse
import atexit
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path

from megatron.training import checkpointing, get_args, global_vars, wandb_utils
from megatron.training import training as megatron_loop
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.event_file_writer import EventFileWriter, _AsyncWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter

from megatron_qad.config.run_files import EVENTS_FILE, START_TAG
from megatron_qad.runtime import QADError, manifest
from megatron_qad.training.event_record import EventRecord, event_files

_MAX_WAITING_BYTES = 16 << 20
"""Of events that could not be written yet: 100,000 steps of some twenty scalars. The oldest are given up first."""
_SECONDS_BETWEEN_TRIES = 1.0
_file_numbers = count()


class Faults:
    """Says each kind of fault of one logger once."""

    def __init__(self, logger: str):
        self._logger = logger
        self._said: set = set()

    def say(self, error: BaseException) -> None:
        kind = (type(error), getattr(error, "errno", None))
        if kind not in self._said:
            self._said.add(kind)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"megatron_qad: ERROR: {self._logger}: {reason}. The job goes on", flush=True)

    def over(self, said: str) -> None:
        """Writing works again after a fault; the next fault is said again."""
        self._said.clear()
        print(f"megatron_qad: {self._logger}: {said}", flush=True)


# TensorBoard --------------------------------------------------------------------------------------------------------


class _EventFile:
    """Takes the place of TensorBoard's ``RecordWriter``: its ``write``, ``flush`` and ``close`` raise nothing.

    TensorBoard's thread ends with the first error that it sees. Here it sees none: records that could not be written
    wait, and are written at the same place of the same file once that works. A file that another process removed or
    cut is left alone, and a new one is begun.
    """

    def __init__(self, directory: Path, faults: Faults):
        self._directory, self._faults = directory, faults
        self._file: Path | None = None
        self._num_bytes = 0  # of the file, all of them ours
        self._head: bytes | None = None  # TensorBoard's first record, which names the format
        self._start = b""  # the record of job/start, also in a file that takes the place of another
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._failed_at: float | None = None
        self._lock = threading.Lock()  # TensorBoard flushes from its thread and from the caller's

    def write(self, data: bytes) -> None:
        header = struct.pack("<Q", len(data))
        record = header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))
        with self._lock:
            if self._head is None:
                self._head = record
                return  # a file appears with its first event: a dry run leaves none
            if not self._start and START_TAG.encode() in data:
                self._start = record
            self._waiting.append(record)
            self._waiting_bytes += len(record)
            while self._waiting_bytes > _MAX_WAITING_BYTES:
                self._waiting_bytes -= len(self._waiting.popleft())
            if self._failed_at is None or time.monotonic() > self._failed_at + _SECONDS_BETWEEN_TRIES:
                self._write_out()

    def flush(self) -> None:
        with self._lock:
            self._write_out()

    close = flush

    def _write_out(self) -> None:
        if not self._waiting:
            return
        try:
            if self._file is None:
                self._begin()
            self._append(b"".join(self._waiting))
        except OSError as error:
            self._failed_at = time.monotonic()
            self._faults.say(error)
            if isinstance(error, FileNotFoundError):
                self._file = None
            return
        if self._failed_at is not None:
            self._faults.over(f"{len(self._waiting)} events that waited are written")
        self._waiting.clear()
        self._waiting_bytes, self._failed_at = 0, None

    def _begin(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"
        file = self._directory / f"events.out.tfevents.{name}"
        file.touch(exist_ok=False)
        self._file, self._num_bytes = file, 0
        self._append(self._head + (self._start if self._start not in self._waiting else b""))

    def _append(self, data: bytes) -> None:
        """All of ``data`` after what the file has, or an error; what a write that failed left is written over."""
        descriptor = os.open(self._file, os.O_WRONLY)
        try:
            if os.fstat(descriptor).st_size < self._num_bytes:
                raise FileNotFoundError(f"{self._file} is shorter than what was written to it; a new file is begun")
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], self._num_bytes + written)
        finally:
            os.close(descriptor)  # where some file systems say that they are full
        self._num_bytes += len(data)


class _FileWriter(FileWriter):
    def __init__(self, directory: str, max_queue: int, flush_secs: int, faults: Faults):
        self.event_writer = EventFileWriter.__new__(EventFileWriter)  # without its constructor, which writes
        self.event_writer._logdir = directory
        self.event_writer._async_writer = _AsyncWriter(_EventFile(Path(directory), faults), max_queue, flush_secs)


class JobWriter(SummaryWriter):
    """TensorBoard's writer of one start of a job. Its first scalar is ``job/start``, which the report sorts files by:
    the number of the start, at the iteration where it goes on.

    Args:
        directory: ``--tensorboard-dir``.
        max_queue: events that wait for TensorBoard's thread before a caller does.
        started_at: the iteration; asked at the first scalar, when the checkpoint is loaded.
        end_record: file that a start before left when it ended (``close``); removed at the first scalar.
    """

    def __init__(self, directory: str, max_queue: int, started_at: Callable[[], int], end_record: Path | None = None):
        self._faults, self._started_at = Faults(f"TensorBoard in {directory}"), started_at
        self._end_record = end_record
        self._number: int | None = len(event_files(Path(directory)))
        super().__init__(directory, max_queue=max_queue)

    def _get_file_writer(self):
        if self.file_writer is None:
            self.file_writer = _FileWriter(self.log_dir, self.max_queue, self.flush_secs, self._faults)
            self.all_writers = {self.log_dir: self.file_writer}
        return self.file_writer

    def add_scalar(self, *args, **named) -> None:
        if self._number is not None:
            number, self._number = self._number, None
            if self._end_record is not None:
                self._survive(self._end_record.unlink, missing_ok=True)
            self.add_scalar(START_TAG, number, self._started_at())
        self._survive(super().add_scalar, *args, **named)

    def add_text(self, *args, **named) -> None:
        self._survive(super().add_text, *args, **named)

    def flush(self) -> None:
        self._survive(super().flush)

    def close(self) -> None:
        self._survive(super().close)

    def _survive(self, method: Callable, *args, **named) -> None:
        try:
            method(*args, **named)
        except Exception as error:
            self._faults.say(error)


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


# wandb and others ---------------------------------------------------------------------------------------------------


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
