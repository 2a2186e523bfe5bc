"""Writes TensorBoard event files, and keeps events in memory while they cannot be written, such as on a full disk.

TensorBoard's own writer stops at the first error, and raises it in every later call.
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
"""Limit of the events that wait to be written: 100,000 steps of about twenty scalars. The oldest are dropped first."""
_SECONDS_BETWEEN_TRIES = 1.0


class FailureLog:
    """Prints each kind of failure of one logger once."""

    def __init__(self, logger: str):
        self._logger = logger
        self._reported: set = set()

    def report(self, error: BaseException) -> None:
        kind = (type(error), getattr(error, "errno", None))
        if kind not in self._reported:
            self._reported.add(kind)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"megatron_qad: ERROR: {self._logger}: {reason}. The job continues.", flush=True)

    def resolved(self, message: str) -> None:
        """Print that writing works again; later failures are reported again."""
        self._reported.clear()
        print(f"megatron_qad: {self._logger}: {message}", flush=True)


class _EventFile:
    """Replaces TensorBoard's ``RecordWriter``; ``write``, ``flush`` and ``close`` raise nothing.

    TensorBoard's thread would end at the first error. Here, records that could not be written wait, and are written at
    the same position of the same file as soon as that works. If another process removed or truncated the file, it is
    left as it is, and a new file is started.
    """

    def __init__(self, directory: Path, failures: FailureLog):
        self._directory, self._failures = directory, failures
        self._file: Path | None = None
        self._num_bytes = 0  # written to the file so far
        self._head: bytes | None = None  # TensorBoard's first record, which identifies the file format
        self._start = b""  # the record of job/start, repeated in a file that replaces another
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._failed_at: float | None = None
        self._lock = threading.Lock()  # TensorBoard flushes from its own thread and from the caller's

    def write(self, data: bytes) -> None:
        header = struct.pack("<Q", len(data))
        record = header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))
        with self._lock:
            if self._head is None:
                self._head = record
                return  # the file is created with the first event, so a dry run creates none
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
                self._start_file()
            self._append(b"".join(self._waiting))
        except OSError as error:
            self._failed_at = time.monotonic()
            self._failures.report(error)
            if isinstance(error, FileNotFoundError):
                self._file = None
            return
        if self._failed_at is not None:
            self._failures.resolved(f"{len(self._waiting)} waiting events are written")
        self._waiting.clear()
        self._waiting_bytes, self._failed_at = 0, None

    def _start_file(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        file = next(file for i in count() if not (file := self._directory / f"{name}.{i}").exists())
        file.touch(exist_ok=False)
        self._file, self._num_bytes = file, 0
        self._append(self._head + (self._start if self._start not in self._waiting else b""))

    def _append(self, data: bytes) -> None:
        """Append all of ``data``, or raise; leftovers of a failed write are overwritten."""
        descriptor = os.open(self._file, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_size < self._num_bytes:
                raise FileNotFoundError(f"{self._file} is shorter than the data written to it; a new file is started")
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], self._num_bytes + written)
        finally:
            os.close(descriptor)  # some file systems report a full disk only here
        self._num_bytes += len(data)


class _FileWriter(FileWriter):
    def __init__(self, directory: str, max_queue: int, flush_secs: int, failures: FailureLog):
        self.event_writer = EventFileWriter.__new__(EventFileWriter)  # without its constructor, which writes
        self.event_writer._logdir = directory
        self.event_writer._async_writer = _AsyncWriter(_EventFile(Path(directory), failures), max_queue, flush_secs)


class JobWriter(SummaryWriter):
    """TensorBoard writer for one start of a job.

    Its first scalar is ``job/start``: the number of the start, at the iteration where training resumes. Run reports
    sort the event files by it.

    Args:
        directory: ``--tensorboard-dir``.
        max_queue: number of events that may wait for TensorBoard's thread before the caller blocks.
        started_at: returns the iteration; called at the first scalar, when the checkpoint is loaded.
        end_record: file that the previous start wrote when it ended (``close``); removed at the first scalar.
    """

    def __init__(self, directory: str, max_queue: int, started_at: Callable[[], int], end_record: Path | None = None):
        self._failures, self._started_at = FailureLog(f"TensorBoard in {directory}"), started_at
        self._end_record = end_record
        self._start_number: int | None = len(event_files(Path(directory)))
        super().__init__(directory, max_queue=max_queue)

    def _get_file_writer(self):
        if self.file_writer is None:
            self.file_writer = _FileWriter(self.log_dir, self.max_queue, self.flush_secs, self._failures)
            self.all_writers = {self.log_dir: self.file_writer}
        return self.file_writer

    def add_scalar(self, *args, **kwargs) -> None:
        if self._start_number is not None:
            start_number, self._start_number = self._start_number, None
            if self._end_record is not None:
                self._call_safely(self._end_record.unlink, missing_ok=True)
            self.add_scalar(START_TAG, start_number, self._started_at())
        self._call_safely(super().add_scalar, *args, **kwargs)

    def add_text(self, *args, **kwargs) -> None:
        self._call_safely(super().add_text, *args, **kwargs)

    def flush(self) -> None:
        self._call_safely(super().flush)

    def close(self) -> None:
        self._call_safely(super().close)

    def _call_safely(self, method: Callable, *args, **kwargs) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            self._failures.report(error)
