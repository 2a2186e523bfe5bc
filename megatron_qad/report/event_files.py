"""TensorBoard event files, read so that a damaged one is no shorter run: every record's checksum, and what the job's
checkpoints say of the files.

An event file is a sequence of records: length (uint64), its masked CRC-32C, that many bytes, theirs. A job that is
killed leaves at most its last record cut off; what else is wrong is damage.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.util.tensor_util import make_ndarray

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.run_files import EVENTS_FILE, START_TAG

_NEXT = "Restore the file from a copy, or accept the gap: --accept-gaps"


@dataclass
class EventFile:
    """The scalars of one event file: tag -> step -> value, the last one that was written."""

    file: Path
    time: float = 0.0
    """Of its first event, in seconds since 1970."""
    start: tuple[int, int] | None = None
    """The number of the job's start and the iteration at which it went on; None in files of older versions."""
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass
class Events:
    """The event files of a run that hold scalars, in the order of the job's starts."""

    files: list[EventFile]
    notes: list[str]
    """What a reader must know of them; sentences."""


def read_events(files: list[Path], run_dir: Path, accept_gaps: bool = False) -> Events:
    """Read and check the event files of one directory.

    Args:
        run_dir: the directory that the user named, in which (or around which) the job's checkpoints are.
        accept_gaps: damage and loss become notes, and what is readable before a damage is read.

    Raises:
        QADError: the file that is damaged, cut off or missing.
    """
    notes, found = [], []
    problems = _problems_by_record(files, run_dir, notes)
    for file in files:
        events, problem = _read(file, notes)
        problems += [problem] if problem else []
        if events.scalars:
            found.append(events)
    if problems and not accept_gaps:
        more = len({problem.split(": ")[0] for problem in problems}) - 1
        raise QADError(f"{problems[0]}{f' And {more} more.' if more else ''} {_NEXT}")
    notes += [f"{problem} What is missing was accepted (--accept-gaps)." for problem in problems]
    # By the job's own count; the clock may have gone back. Files without it are of older versions.
    found.sort(key=lambda events: (events.start[0] if events.start else -1, events.time))
    return Events(found, notes)


def _read(file: Path, notes: list[str]) -> tuple[EventFile, str | None]:
    """A file's scalars, and what is wrong with it."""
    events = EventFile(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        return events, f"{file}: not readable: {error.strerror}."
    read = 0
    try:
        for event, read in _records(data):  # noqa: B007
            if not events.time:
                events.time = event.wall_time
            for value in event.summary.value:
                if (number := _scalar(value)) is not None:
                    events.scalars.setdefault(value.tag, {})[event.step] = number
    except ValueError as error:
        return events, f"{file}: damaged: {error}."
    if read < len(data):
        notes.append(
            f"{file.name} ends within a record, as a job leaves it that was killed; {len(data) - read} bytes of it "
            "are left out."
        )
    if START_TAG in events.scalars:
        ((step, number),) = list(events.scalars.pop(START_TAG).items())[:1]
        events.start = int(number), step
    return events, None


def _records(data: bytes) -> Iterator[tuple[Event, int]]:
    """Each event and where it ends; ends before a record that is cut off.

    Raises:
        ValueError: a record is not what was written.
    """
    start, number = 0, 1
    while start + 12 <= len(data):
        header = data[start : start + 8]
        where = f"record {number}, at byte {start}"
        if struct.pack("<I", masked_crc32c(header)) != data[start + 8 : start + 12]:
            raise ValueError(f"the length of {where}, has another checksum")
        end = start + 12 + struct.unpack("<Q", header)[0]
        if end + 4 > len(data):
            return
        content = data[start + 12 : end]
        if struct.pack("<I", masked_crc32c(content)) != data[end : end + 4]:
            raise ValueError(f"{where}, has another checksum")
        try:
            event = Event.FromString(content)
        except Exception as error:  # protobuf's own kind of error
            raise ValueError(f"{where}, is no event: {error}") from error
        start, number = end + 4, number + 1
        yield event, start


def _scalar(value) -> float | None:
    """A value of a summary if it is a scalar, in the form of torch's writer or in TensorBoard's newer one."""
    if value.HasField("simple_value"):
        return value.simple_value
    if value.metadata.plugin_data.plugin_name == "scalars" and value.HasField("tensor"):
        return float(make_ndarray(value.tensor))
    return None


# The record in the checkpoints --------------------------------------------------------------------------------------


def _problems_by_record(files: list[Path], run_dir: Path, notes: list[str]) -> list[str]:
    """What the files lack or have otherwise than the job's records say; each file once."""
    directory = files[0].parent
    run = run_dir.parent if directory == run_dir and not _records_of(run_dir) else run_dir
    problems: dict[str, str] = {}
    for record in _records_of(run):
        recorded, of_directory = _parse(record)
        if os.path.normpath(run.resolve() / of_directory) != str(directory.resolve()):
            if run == run_dir:
                notes.append(
                    f"its job wrote its events to {of_directory}, not to {directory.name}, so that what "
                    f"{record.relative_to(run)} says of them is not checked."
                )
            continue
        for name, (num_bytes, digest) in recorded.items():
            if problem := _problem_of(directory / name, num_bytes, digest):
                problems.setdefault(name, f"{directory / name}: {problem} ({record.relative_to(run)}).")
    return list(problems.values())


def _records_of(run: Path) -> list[Path]:
    """The newest checkpoint's record, and that of the end of the job, if it ended in order."""
    iterations = {path.parent.name.removeprefix("iter_"): path for path in run.glob(f"iter_*/{EVENTS_FILE}")}
    iterations = {int(number): path for number, path in iterations.items() if number.isdigit()}
    newest = [iterations[max(iterations)]] if iterations else []
    return newest + [path for path in (run / EVENTS_FILE,) if path.is_file()]


def _parse(record: Path) -> tuple[dict[str, tuple[int, str]], str]:
    try:
        found = json.loads(record.read_text())
        files = {name: (int(one["bytes"]), str(one["sha256"])) for name, one in found["files"].items()}
        return files, str(found["directory"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QADError(f"{record}: not readable as a record of event files ({error}). Restore it from a copy") from None


def _problem_of(file: Path, num_bytes: int, digest: str) -> str | None:
    if not file.is_file():
        return f"missing; it had {num_bytes} bytes"
    try:
        with open(file, "rb") as stream:
            found = stream.read(num_bytes)
    except OSError as error:
        return f"not readable: {error.strerror}"
    if len(found) < num_bytes:
        return f"cut off: it has {len(found)} bytes and had {num_bytes}"
    if hashlib.sha256(found).hexdigest() != digest:
        return f"changed: its first {num_bytes} bytes have another SHA-256 than when they were written"
    return None
