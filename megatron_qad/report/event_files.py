"""Read and verify TensorBoard event files, so that a damaged file is not taken for a shorter run.

The checksum of every record is verified, and the files are compared with the sizes and hashes recorded in the job's
checkpoints. An event file is a sequence of records: length (uint64), its masked CRC-32C, data, its masked CRC-32C. A
killed job can leave a truncated last record; any other deviation is damage.
"""

import hashlib
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
from megatron_qad.engine.text_files import read_json

_NEXT_STEP = "Restore the file from a copy, or accept the gap with --accept-gaps."


@dataclass
class EventFile:
    """The scalars of one event file: tag -> step -> value (the last one written for the step)."""

    file: Path
    time: float = 0.0
    """Time of the first event, in seconds since 1970."""
    last_time: float = 0.0
    """Time of the last event."""
    start: tuple[int, int] | None = None
    """Number of the job's start and the iteration that it resumed from; None in files of older versions."""
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass
class Events:
    """The event files of a run that hold scalars, in the order of the job's starts."""

    files: list[EventFile]
    notes: list[str]
    """Sentences about truncated, damaged or unchecked files."""


def read_events(files: list[Path], run_dir: Path, accept_gaps: bool = False) -> Events:
    """Read and check the event files of one directory.

    Args:
        run_dir: the directory given by the user: the one with the job's checkpoints, or a subdirectory of it.
        accept_gaps: turn damage and loss into notes and read a damaged file up to the damage.

    Raises:
        QADError: a file is damaged, truncated or missing.
    """
    notes, event_files = [], []
    problems = _find_recorded_problems(files, run_dir, notes)
    for file in files:
        events, problem = _read(file, notes)
        problems += [problem] if problem else []
        if events.scalars:
            event_files.append(events)
    if problems and not accept_gaps:
        num_more = len({problem.split(": ")[0] for problem in problems}) - 1
        raise QADError(f"{problems[0]}{f' And {num_more} more.' if num_more else ''} {_NEXT_STEP}")
    notes += [f"{problem} The gap was accepted (--accept-gaps)." for problem in problems]
    # Sorted by the job's own count of starts, because the clock may have gone back; older versions have no count.
    event_files.sort(key=lambda events: (events.start[0] if events.start else -1, events.time))
    return Events(event_files, notes)


def _read(file: Path, notes: list[str]) -> tuple[EventFile, str | None]:
    """Return the scalars of a file and a description of its damage, if any."""
    events = EventFile(file)
    try:
        data = file.read_bytes()
    except OSError as error:
        return events, f"{file}: cannot be read: {error.strerror}."
    num_read = 0
    try:
        for event, num_read in _records(data):  # noqa: B007
            if not events.time:
                events.time = event.wall_time
            events.last_time = event.wall_time
            for value in event.summary.value:
                if (scalar := _scalar(value)) is not None:
                    events.scalars.setdefault(value.tag, {})[event.step] = scalar
    except ValueError as error:
        return events, f"{file}: damaged: {error}."
    if num_read < len(data):
        notes.append(
            f"{file.name} ends within a record, as after a killed job; its last {len(data) - num_read} bytes are "
            "ignored."
        )
    if START_TAG in events.scalars:
        ((step, number),) = list(events.scalars.pop(START_TAG).items())[:1]
        events.start = int(number), step
    return events, None


def _records(data: bytes) -> Iterator[tuple[Event, int]]:
    """Yield each event and the offset of its end; stop before a truncated record.

    Raises:
        ValueError: a record is damaged.
    """
    start, index = 0, 1
    while start + 12 <= len(data):
        header = data[start : start + 8]
        where = f"record {index} at byte {start}"
        if struct.pack("<I", masked_crc32c(header)) != data[start + 8 : start + 12]:
            raise ValueError(f"the length of {where} does not match its checksum")
        end = start + 12 + struct.unpack("<Q", header)[0]
        if end + 4 > len(data):
            return
        content = data[start + 12 : end]
        if struct.pack("<I", masked_crc32c(content)) != data[end : end + 4]:
            raise ValueError(f"{where} does not match its checksum")
        try:
            event = Event.FromString(content)
        except Exception as error:  # protobuf's own error class
            raise ValueError(f"{where} is not an event: {error}") from error
        start, index = end + 4, index + 1
        yield event, start


def _scalar(value) -> float | None:
    """Return a summary value if it is a scalar, in the format of torch's writer or in TensorBoard's newer format."""
    if value.HasField("simple_value"):
        return value.simple_value
    if value.metadata.plugin_data.plugin_name == "scalars" and value.HasField("tensor"):
        return float(make_ndarray(value.tensor))
    return None


# Records in the checkpoints --------------------------------------------------------------------------------------


def _find_recorded_problems(files: list[Path], run_dir: Path, notes: list[str]) -> list[str]:
    """Return the deviations of the files from the job's records, at most one per file."""
    directory = files[0].parent
    run = run_dir.parent if directory == run_dir and not _find_records(run_dir) else run_dir
    problems: dict[str, str] = {}
    for record in _find_records(run):
        recorded, recorded_directory = _parse(record)
        if os.path.normpath(run.resolve() / recorded_directory) != str(directory.resolve()):
            if run == run_dir:
                notes.append(
                    f"its job wrote its events to {recorded_directory}, not to {directory.name}, so they were not "
                    f"checked against {record.relative_to(run)}."
                )
            continue
        for name, (num_bytes, digest) in recorded.items():
            if problem := _check_file(directory / name, num_bytes, digest):
                problems.setdefault(name, f"{directory / name}: {problem} ({record.relative_to(run)}).")
    return list(problems.values())


def _find_records(run: Path) -> list[Path]:
    """Return the record of the newest checkpoint and, if the job ended normally, the record of its end."""
    iterations = {path.parent.name.removeprefix("iter_"): path for path in run.glob(f"iter_*/{EVENTS_FILE}")}
    iterations = {int(name): path for name, path in iterations.items() if name.isdigit()}
    newest = [iterations[max(iterations)]] if iterations else []
    return newest + [path for path in (run / EVENTS_FILE,) if path.is_file()]


def _parse(record: Path) -> tuple[dict[str, tuple[int, str]], str]:
    try:
        content = read_json(record)
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        return files, str(content["directory"])
    except (QADError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise QADError(f"{record}: not a valid record of event files ({error}). Restore it from a copy.") from None


def _check_file(file: Path, num_bytes: int, digest: str) -> str | None:
    if not file.is_file():
        return f"missing; expected {num_bytes} bytes"
    try:
        with open(file, "rb") as stream:
            data = stream.read(num_bytes)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if len(data) < num_bytes:
        return f"truncated: it has {len(data)} bytes, expected {num_bytes}"
    if hashlib.sha256(data).hexdigest() != digest:
        return f"changed: the SHA-256 of its first {num_bytes} bytes differs from the recorded one"
    return None
