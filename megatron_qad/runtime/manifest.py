"""Checksums of a checkpoint directory, so that a damaged one is known by name before anything is read from it.

The manifest is Megatron's own ``integrity.json`` (SHA-256 of every file; its ``--verify-integrity`` reads it too), with
the sizes beside the sums. Here it is written by all ranks together, each summing up what it wrote, and checked the same
way. Left out: who writes checkpoints (``whole_saves``) and which one is loaded (``training.checkpoints``).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_qad.runtime.errors import QADError

FILE = "integrity.json"
_NEEDED = (".metadata", "metadata.json")
"""What every torch_dist checkpoint has; Megatron writes them last."""

_found_whole: set[Path] = set()
Sum = tuple[int, str]
"""Bytes and SHA-256 of a file."""


def sum_of(file: Path) -> Sum:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


def write(directory: Path, sums: Mapping[str, Sum]) -> None:
    """The manifest of ``directory``, on the disk when this returns."""
    names = sorted(sums)
    text = json.dumps(
        {
            "algorithm": "sha256",
            "files": {name: sums[name][1] for name in names},
            "bytes": {name: sums[name][0] for name in names},
        },
        indent=1,
    )
    write_atomically(directory / FILE, text)


def num_bytes(directory: Path) -> int:
    """Size of a checkpoint."""
    return sum(file.stat().st_size for file in directory.iterdir())


def faults(directory: Path, rank: int = 0, size: int = 1) -> list[str]:
    """What is wrong with a checkpoint, a sentence a file; an empty list if it is whole.

    Names and sizes of all files are looked at, contents of every ``size``-th from ``rank`` on: the share of a rank. A
    checkpoint without a manifest (saved by something else) only has to have what every checkpoint has.
    """
    if missing := [name for name in _NEEDED if not (directory / name).is_file()]:
        return [f"{directory.name} has no {missing[0]}: it was never finished"]
    if not (directory / FILE).is_file():
        return []
    try:
        found = json.loads((directory / FILE).read_text())
        sizes = found.get("bytes", {})  # Megatron's own manifests have none
        sums = {name: (sizes.get(name), digest) for name, digest in found["files"].items()}
    except (ValueError, KeyError, AttributeError):
        return [f"{directory.name}/{FILE} is not readable"]
    wrong = []
    for name, (expected, _) in sums.items():
        file = directory / name
        if not file.is_file():
            wrong.append(f"{directory.name}/{name} is missing")
        elif expected is not None and file.stat().st_size != expected:
            wrong.append(f"{directory.name}/{name} has {file.stat().st_size} bytes, not {expected}")
    if wrong:
        return wrong
    mine = sorted(sums)[rank::size]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves Python's lock
        for name, (_, digest) in zip(mine, pool.map(lambda name: sum_of(directory / name), mine), strict=True):
            if digest != sums[name][1]:
                wrong.append(f"{directory.name}/{name} has another SHA-256 than when it was written")
    return wrong


def faults_shared(directory: Path) -> list[str]:
    """``faults``, with the files shared out over the ranks; the same list on all of them. Every rank calls this."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return faults(directory)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[list[str]] = [[] for _ in range(size)]
    torch.distributed.all_gather_object(found, faults(directory, rank, size))
    return sorted({fault for share in found for fault in share})


def require_whole(directory: Path) -> None:
    """Refuse a damaged or unfinished checkpoint by name. Every rank calls this; a process reads a directory once.

    Raises:
        QADError: the files that are wrong.
    """
    if directory.resolve() in _found_whole:
        return
    wrong = faults_shared(directory)
    if not wrong:
        _found_whole.add(directory.resolve())
    else:
        raise QADError(
            f"{directory} is damaged: {'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. "
            f"Use another checkpoint (a job that resumes takes the one before by itself); if you changed the files on "
            f"purpose, remove {FILE}"
        )


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's content at once: whoever reads it, also after a crash, finds the old one or the new one."""
    aside = file.with_name(file.name + ".new")
    with open(aside, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, file)
    sync(file.parent)


def write_or_say(file: Path, text: str) -> None:
    """``write_atomically`` of what a job can do without: a full disk is said and is no reason to stop."""
    try:
        write_atomically(file, text)
    except OSError as error:
        file.with_name(file.name + ".new").unlink(missing_ok=True)
        print(f"megatron_qad: ERROR: {file} could not be written: {error}", flush=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
