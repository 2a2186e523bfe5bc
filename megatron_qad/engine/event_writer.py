"""TensorBoard's event files as a job writes them: what cannot be written waits, and is written when there is room.

TensorBoard's own writer ends with the first error that it sees, and raises it in every call from then on.
"""

import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path

from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.event_file_writer import EventFileWriter, _AsyncWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter

from megatron_qad.engine.event_record import event_files
from megatron_qad.engine.run_directory.run_files import START_TAG

_MAX_WAITING_BYTES = 16 << 20
"""Of events that could not be written yet: 100,000 steps of some twenty scalars. The oldest are given up first."""
_SECONDS_BETWEEN_TRIES = 1.0


class FailureLog:
    """Says each kind of failure of one logger once."""

    def __init__(self, logger: str):
        self._logger = logger
        self._said: set = set()

    def report(self, error: BaseException) -> None:
        kind = (type(error), getattr(error, "errno", None))
        if kind not in self._said:
            self._said.add(kind)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"megatron_qad: ERROR: {self._logger}: {reason}. The job goes on", flush=True)

    def resolved(self, said: str) -> None:
        """Writing works again after a failure; the next failure is said again."""
        self._said.clear()
        print(f"megatron_qad: {self._logger}: {said}", flush=True)


class _EventFile:
    """Takes the place of TensorBoard's ``RecordWriter``: its ``write``, ``flush`` and ``close`` raise nothing.

    TensorBoard's thread ends with the first error that it sees. Here it sees none: records that could not be written
    wait, and are written at the same place of the same file once that works. A file that another process removed or
    cut is left alone, and a new one is begun.
    """

    def __init__(self, directory: Path, failures: FailureLog):
        self._directory, self._failures = directory, failures
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
            self._failures.report(error)
            if isinstance(error, FileNotFoundError):
                self._file = None
            return
        if self._failed_at is not None:
            self._failures.resolved(f"{len(self._waiting)} events that waited are written")
        self._waiting.clear()
        self._waiting_bytes, self._failed_at = 0, None

    def _begin(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        file = next(file for number in count() if not (file := self._directory / f"{name}.{number}").exists())
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
    def __init__(self, directory: str, max_queue: int, flush_secs: int, failures: FailureLog):
        self.event_writer = EventFileWriter.__new__(EventFileWriter)  # without its constructor, which writes
        self.event_writer._logdir = directory
        self.event_writer._async_writer = _AsyncWriter(_EventFile(Path(directory), failures), max_queue, flush_secs)


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
        self._failures, self._started_at = FailureLog(f"TensorBoard in {directory}"), started_at
        self._end_record = end_record
        self._number: int | None = len(event_files(Path(directory)))
        super().__init__(directory, max_queue=max_queue)

    def _get_file_writer(self):
        if self.file_writer is None:
            self.file_writer = _FileWriter(self.log_dir, self.max_queue, self.flush_secs, self._failures)
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
            self._failures.report(error)
