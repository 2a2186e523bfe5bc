"""Checksums of a checkpoint directory, so that damage is detected, file by file, before anything is read.

The manifest is Megatron's ``integrity.json`` (SHA-256 of every file; its ``--verify-integrity`` reads it too), with the
file sizes added. All ranks write it together, each hashing the files that it wrote, and check it the same way.
Directories that one process writes, such as ``hf/``, have the same manifest. ``atomic_checkpoint`` writes checkpoints,
``resume_point`` selects the one to load.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.new_files import open_new
from megatron_qad.engine.system_errors import naming
from megatron_qad.engine.text_files import read_json

FILE = "integrity.json"
_NEEDED = (".metadata", "metadata.json")
"""Files that every torch_dist checkpoint has; Megatron writes them last."""

_NEXT_STEP = "Restore it from a copy, or import the model again."

_verified: set[Path] = set()
Sum = tuple[int, str]
"""Size in bytes and SHA-256 of a file."""


def sum_of(file: Path) -> Sum:
    """Return the size and SHA-256 of one file."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


def sums_of(directory: Path, names: Sequence[str]) -> dict[str, Sum]:
    """Return the sums of several files, hashed in threads: hashing releases Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: sum_of(directory / name), names), strict=True))


def write_sums(directory: Path, sums: Mapping[str, Sum]) -> None:
    """Write the manifest of ``directory`` from known sums. It is on the disk when this returns."""
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
    """Return the size of a checkpoint in bytes."""
    return sum(file.stat().st_size for file in directory.iterdir())


def files_in(directory: Path) -> list[str]:
    """Return the relative names of all files in and below a directory, sorted, without its manifest."""
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    # .nfs...: an NFS client keeps this for a file that was removed while it was open.
    return sorted(name for name in names if name != FILE and not Path(name).name.startswith(".nfs"))


def write_manifest(directory: Path) -> None:
    """Hash all files of a directory and write its manifest."""
    write_sums(directory, sums_of(directory, files_in(directory)))


def read(directory: Path) -> dict[str, tuple[int | None, str]]:
    """Return bytes (None in Megatron's own manifests) and SHA-256 of each file in the manifest of ``directory``.

    Raises:
        QADError: the manifest is missing or damaged.
    """
    file = directory / FILE
    if not file.is_file():
        raise QADError(f"{directory.name} has no {FILE}, so damage cannot be detected")
    try:
        content = read_json(file)
        sizes = content.get("bytes", {})
        return {str(name): (sizes.get(name), str(digest)) for name, digest in content["files"].items()}
    except (QADError, KeyError, AttributeError) as error:
        raise QADError(f"{directory.name}/{FILE} is not readable") from error


def find_problems(directory: Path, rank: int = 0, size: int = 1, needed: Sequence[str] = _NEEDED) -> list[str]:
    """Return the problems of a checkpoint, one phrase for each file; an empty list if it is valid.

    Checks names and sizes of all files, and the contents of this rank's share: every ``size``-th file from ``rank`` on.
    A file that the manifest does not list is a problem, because Megatron loads some files by name. So is a file outside
    of the directory, or a link to one; the directory itself may be a link.

    Args:
        needed: files that must exist.
    """
    if missing := [name for name in needed if not (directory / name).is_file()]:
        return [f"{directory.name} has no {missing[0]}: the save never finished"]
    try:
        sums = read(directory)
    except QADError as error:
        return [str(error)]
    problems = [f"{directory.name}/{name} is not listed in {FILE}" for name in files_in(directory) if name not in sums]
    for name, (expected, _) in sums.items():
        file = directory / name
        if not file.resolve().is_relative_to(directory.resolve()):
            problems.append(f"{directory.name}/{name} is outside of the directory, or a link that leads out of it")
        elif not file.is_file():
            problems.append(f"{directory.name}/{name} is missing")
        elif expected is not None and file.stat().st_size != expected:
            problems.append(f"{directory.name}/{name} has {file.stat().st_size} bytes, not {expected}")
    if problems:
        return problems
    for name, (_, digest) in sums_of(directory, sorted(sums)[rank::size]).items():
        if digest != sums[name][1]:
            problems.append(f"{directory.name}/{name} has a different SHA-256 from when it was written")
    return problems


def verify_file(file: Path) -> None:
    """Check one file against the manifest in its directory, without reading the other files.

    Raises:
        QADError: the file is missing, not listed or damaged, or there is no manifest.
    """
    directory = file.parent
    try:
        expected = read(directory).get(file.name)
        actual = sum_of(file) if file.is_file() else None
    except QADError as error:
        raise QADError(f"{file}: {error}. {_NEXT_STEP}") from error
    if expected is None or actual is None:
        problem = "is missing" if actual is None else f"is not listed in {FILE}"
    elif expected[1] != actual[1]:
        problem = "has a different SHA-256 from when it was written"
    else:
        return
    raise QADError(f"{file}: {problem}. {_NEXT_STEP}")


def find_problems_across_ranks(directory: Path) -> list[str]:
    """``find_problems`` with the files divided among the ranks. Every rank calls this and gets the same list."""
    import torch  # here, because command lines read records before torch is needed

    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return find_problems(directory)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares: list[list[str]] = [[] for _ in range(size)]
    torch.distributed.all_gather_object(shares, find_problems(directory, rank, size))
    return sorted({problem for share in shares for problem in share})


def verify_checkpoint(directory: Path) -> None:
    """Check that a checkpoint is complete and undamaged. Every rank calls this; a process reads a directory once.

    Raises:
        QADError: the checkpoint is damaged or unfinished; the message names the files.

    Example::

        from megatron_qad.engine.run_directory import iterations, manifest
        directory = iterations.iteration_dir("runs/qad")
        manifest.verify_checkpoint(directory)  # raises QADError if a file is damaged
    """
    if directory.resolve() in _verified:
        return
    problems = find_problems_across_ranks(directory)
    if not problems:
        _verified.add(directory.resolve())
    else:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise QADError(
            f"{directory} is damaged: {'; '.join(problems[:3])}{more}. "
            "Use another checkpoint (a job that resumes selects the previous valid one)."
        )


def verify_directory(directory: Path, *needed: str) -> None:
    """Check a directory that is not a checkpoint, such as ``hf/``, against its manifest.

    Raises:
        QADError: the directory is damaged; the message names the files.
    """
    if problems := find_problems(directory, needed=needed):
        raise QADError(f"{directory} is damaged: {'; '.join(problems[:3])}. {_NEXT_STEP}")


def write_atomically(file: Path, text: str) -> None:
    """Replace a file's content atomically: a reader, also after a crash, sees the old content or the new one."""
    aside = file.with_name(file.name + ".new")
    try:
        with naming(file), open_new(aside) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except OSError:
        with contextlib.suppress(OSError):  # a read-only file system
            aside.unlink(missing_ok=True)
        raise
    sync(file.parent)


def write_or_warn(file: Path, text: str) -> None:
    """Write an optional file atomically: an error, such as a full disk, is logged and does not stop the job."""
    try:
        write_atomically(file, text)
    except OSError as error:
        print(f"megatron_qad: ERROR: {file} could not be written: {error}.", flush=True)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
