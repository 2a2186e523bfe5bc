"""Reads whole data files once: their SHA-256 and their smallest and largest value, remembered for the next start.

Reading takes as long as hashing: 2 GB/s per file with SHA instructions, a fifth of that without. The ranks of a job
share the files. The facts are kept in a small record in the index cache. A later start uses them if size, modification
time and change time of a file are the same; a copied file has another change time, also if its modification time was
kept.
"""

import dataclasses
import hashlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_qad.data.index_cache import replace_file
from megatron_qad.engine.distributed import on_every_rank, on_rank_0
from megatron_qad.engine.entry_point import describe
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records

MAX_BYTES = 100 << 30
"""Largest number of bytes that a rank reads at a start: a minute with SHA instructions, less than the ten minutes for
which the other ranks wait in a collective without. ``megatron-qad verify`` reads larger files."""

_BLOCK = 8 << 20


@dataclass(frozen=True)
class FileFacts:
    """What is known about the content of a data file."""

    stamp: tuple[int, int, int]
    """Size in bytes, modification time and change time in ns."""
    sha256: str
    smallest: int | None
    largest: int | None
    """Smallest and largest value; None if the file does not hold integers, or is empty."""


_FIELDS = {field.name for field in dataclasses.fields(FileFacts)}


@dataclass(frozen=True)
class Reading:
    """The result of ``read_facts``."""

    facts: dict[str, FileFacts]
    """Facts of each file that was read now or earlier."""
    read: list[str]
    """Files that were read now."""
    skipped: list[str]
    """Files that were not read because of the limit."""
    seconds: float


def read_facts(files: Mapping[str, tuple[str | None, Path]], max_bytes: int | None = MAX_BYTES) -> Reading:
    """Return the facts of files that all ranks can read. Collective.

    Args:
        files: path -> (NumPy dtype of its values or None, record in which its facts are remembered).
        max_bytes: largest number of bytes that each rank reads; the smallest files are read first. None: no limit.

    Raises:
        QADError: a file cannot be read.
    """
    start = time.monotonic()
    # Rank 0 decides for all: on a network file system, ranks may see different times for a while.
    stamps, known = on_rank_0(lambda: _recall(files))
    unknown = sorted((file for file in files if file not in known), key=lambda file: (stamps[file][0], file))

    def read_share(rank: int, size: int) -> dict[str, FileFacts]:
        share, total = [], 0
        for file in unknown[rank::size]:
            total += stamps[file][0]
            if max_bytes is None or total <= max_bytes:
                share.append(file)
        with ThreadPoolExecutor(4) as pool:  # hashing releases Python's lock
            return dict(zip(share, pool.map(lambda file: facts_of(file, files[file][0]), share), strict=True))

    now = {file: facts for share in on_every_rank(read_share) for file, facts in share.items()}
    facts = known | now
    if now:
        on_rank_0(lambda: _remember(files, facts))
    return Reading(facts, sorted(now), [file for file in unknown if file not in now], time.monotonic() - start)


def facts_of(file: str, dtype: str | None) -> FileFacts:
    """Read a file and return its facts.

    Args:
        dtype: integer type of its values, or None for other files.
    """
    digest, smallest, largest, block = hashlib.sha256(), None, None, memoryview(bytearray(_BLOCK))
    with open(file, "rb", buffering=0) as stream:
        stamp = _stamp(os.fstat(stream.fileno()))
        while size := _fill(stream, block):
            digest.update(block[:size])
            if dtype is not None and size >= (width := np.dtype(dtype).itemsize):
                values = np.frombuffer(block[: size // width * width], dtype)
                low, high = int(values.min()), int(values.max())
                smallest = low if smallest is None else min(smallest, low)
                largest = high if largest is None else max(largest, high)
    return FileFacts(stamp, digest.hexdigest(), smallest, largest)


def _fill(stream, block: memoryview) -> int:
    """Read until ``block`` is full or the file ends, so that no value is divided between two blocks."""
    size = 0
    while size < len(block) and (count := stream.readinto(block[size:])):
        size += count
    return size


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _recall(files: Mapping[str, tuple[str | None, Path]]) -> tuple[dict, dict[str, FileFacts]]:
    """Return the stamp of each file, and the remembered facts of those that have not changed."""
    stamps = {file: _stamp(os.stat(file)) for file in files}
    known = {}
    for record in {record for _, record in files.values()}:
        try:
            content = json_records.read(record)
        except QADError:  # missing or damaged: the files are read again
            continue
        for file, (_, its_record) in files.items():
            entry = content.get(str(Path(file).resolve())) if its_record == record else None
            if entry and entry.keys() == _FIELDS and tuple(entry["stamp"]) == stamps[file]:
                known[file] = FileFacts(**entry | {"stamp": stamps[file]})
    return stamps, known


def _remember(files: Mapping[str, tuple[str | None, Path]], facts: Mapping[str, FileFacts]) -> None:
    for record in {record for _, record in files.values()}:
        content = {
            str(Path(file).resolve()): dataclasses.asdict(facts[file])
            for file, (_, its_record) in files.items()
            if its_record == record and file in facts
        }
        text = json_records.to_text(record.name, content)
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            replace_file(record, lambda stream, text=text: stream.write(text.encode()))
        except OSError as error:
            print(
                f"megatron_qad: {record}: cannot be written ({describe(error)}) The next start reads the data files "
                "again. Give a writable --data-cache-path to avoid that.",
                flush=True,
            )
