"""Checksums of a checkpoint directory, so that a damaged one is known by name before anything is read from it.

The manifest is Megatron's own ``integrity.json`` (SHA-256 of every file; its ``--verify-integrity`` reads it too), with
the sizes beside the sums. Here it is written by all ranks together, each summing up what it wrote, and checked the same
way. Directories that one process writes, such as ``hf/``, are sealed with the same file. Left out: who writes
checkpoints (``atomic_checkpoint``) and which one is loaded (``resume_point``).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_qad.engine.errors import QADError

FILE = "integrity.json"
_NEEDED = (".metadata", "metadata.json")
"""What every torch_dist checkpoint has; Megatron writes them last."""

_NEXT = "Restore it from a copy, or import the model again"

_verified: set[Path] = set()
Sum = tuple[int, str]
"""Bytes and SHA-256 of a file."""


def sum_of(file: Path) -> Sum:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


def sums_of(directory: Path, names: Sequence[str]) -> dict[str, Sum]:
    """Several files' sums; hashing leaves Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sum_of(directory / name), names), strict=True))


def write_sums(directory: Path, sums: Mapping[str, Sum]) -> None:
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


def files_in(directory: Path) -> list[str]:
    """Names of all files in a directory and below, relative to it, but for its manifest; sorted."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    # .nfs...: what an NFS client keeps of a file that was removed while it was open.
    return sorted(name for name in found if name != FILE and not Path(name).name.startswith(".nfs"))


def write_manifest(directory: Path) -> None:
    """Write the manifest of a directory as it is now."""
    write_sums(directory, sums_of(directory, files_in(directory)))


def read(directory: Path) -> dict[str, tuple[int | None, str]]:
    """Bytes (None in Megatron's own manifests) and SHA-256 of each file that the manifest of ``directory`` lists.

    Raises:
        QADError: there is none, or it is damaged.
    """
    file = directory / FILE
    try:
        found = json.loads(file.read_text())
        sizes = found.get("bytes", {})
        return {str(name): (sizes.get(name), str(digest)) for name, digest in found["files"].items()}
    except FileNotFoundError:
        raise QADError(f"{directory.name} has no {FILE}, so that damage could not be noticed") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QADError(f"{directory.name}/{FILE} is not readable") from error


def find_problems(directory: Path, rank: int = 0, size: int = 1, needed: Sequence[str] = _NEEDED) -> list[str]:
    """What is wrong with a checkpoint, a phrase a file; an empty list if it is whole.

    Names and sizes of all files are looked at, contents of every ``size``-th from ``rank`` on: the share of a rank.
    A file that the manifest does not list is a problem, because Megatron would load some by their names.

    Args:
        needed: files that must be there.
    """
    if missing := [name for name in needed if not (directory / name).is_file()]:
        return [f"{directory.name} has no {missing[0]}: it was never finished"]
    try:
        sums = read(directory)
    except QADError as error:
        return [str(error)]
    wrong = [f"{directory.name}/{name} is not listed in {FILE}" for name in files_in(directory) if name not in sums]
    for name, (expected, _) in sums.items():
        file = directory / name
        if not file.is_file():
            wrong.append(f"{directory.name}/{name} is missing")
        elif expected is not None and file.stat().st_size != expected:
            wrong.append(f"{directory.name}/{name} has {file.stat().st_size} bytes, not {expected}")
    if wrong:
        return wrong
    for name, (_, digest) in sums_of(directory, sorted(sums)[rank::size]).items():
        if digest != sums[name][1]:
            wrong.append(f"{directory.name}/{name} has another SHA-256 than when it was written")
    return wrong


def verify_file(file: Path) -> None:
    """Refuse one file of a sealed directory that is not what the manifest beside it says, without reading the others.

    Raises:
        QADError: it is missing, not listed or damaged, or there is no manifest.
    """
    directory = file.parent
    try:
        expected = read(directory).get(file.name)
        found = sum_of(file) if file.is_file() else None
    except QADError as error:
        raise QADError(f"{file}: {error}. {_NEXT}") from error
    if expected is None or found is None:
        what = "is missing" if found is None else f"is not listed in {FILE}"
    elif expected[1] != found[1]:
        what = "has another SHA-256 than when it was written"
    else:
        return
    raise QADError(f"{file}: {what}. {_NEXT}")


def find_problems_across_ranks(directory: Path) -> list[str]:
    """``find_problems``, with the files shared out over the ranks; the same list on all of them. Every rank calls
    this."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return find_problems(directory)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[list[str]] = [[] for _ in range(size)]
    torch.distributed.all_gather_object(found, find_problems(directory, rank, size))
    return sorted({problem for share in found for problem in share})


def verify_checkpoint(directory: Path) -> None:
    """Refuse a damaged or unfinished checkpoint by name. Every rank calls this; a process reads a directory once.

    Raises:
        QADError: the files that are wrong.
    """
    if directory.resolve() in _verified:
        return
    wrong = find_problems_across_ranks(directory)
    if not wrong:
        _verified.add(directory.resolve())
    else:
        raise QADError(
            f"{directory} is damaged: {'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. "
            "Use another checkpoint (a job that resumes takes the one before by itself)"
        )


def verify_directory(directory: Path, *needed: str) -> None:
    """Refuse a damaged directory that is no checkpoint, such as ``hf/``.

    Raises:
        QADError: the files that are wrong.
    """
    if wrong := find_problems(directory, needed=needed):
        raise QADError(f"{directory} is damaged: {'; '.join(wrong[:3])}. {_NEXT}")


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's content at once: whoever reads it, also after a crash, finds the old one or the new one."""
    aside = file.with_name(file.name + ".new")
    with open(aside, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, file)
    sync(file.parent)


def write_or_warn(file: Path, text: str) -> None:
    """``write_atomically`` of what a job can do without: a full disk is said and is no reason to stop."""
    try:
        write_atomically(file, text)
    except OSError as error:
        with contextlib.suppress(OSError):  # a file system that became read-only
            file.with_name(file.name + ".new").unlink(missing_ok=True)
        print(f"megatron_qad: ERROR: {file} could not be written: {error}", flush=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
