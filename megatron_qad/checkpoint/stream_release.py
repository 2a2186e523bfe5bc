"""Writes a checkpoint's ``release/`` from tensors that are converted one at a time, and continues a killed write.

Ranks and their worker processes share the parts. ``release.write_release`` is for tensors that are in memory already.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from megatron_qad.checkpoint import torch_dist_writer, worker_pool
from megatron_qad.checkpoint.partial_directory import PartialDirectory
from megatron_qad.checkpoint.progress import Progress
from megatron_qad.checkpoint.release import run_on_all_ranks
from megatron_qad.checkpoint.torch_dist_writer import Part
from megatron_qad.engine.distributed import on_rank_0, rank_and_size
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.run_files import TRACKER


def stream_release[T](
    target: Path,
    *,
    parts: Sequence[Sequence[tuple[T, int]]],
    convert: Callable[[T], Iterable[tuple[str, torch.Tensor]]],
    finish: Callable[[Path], None],
    job: dict,
    num_workers: int,
) -> None:
    """Write the checkpoint ``target``. Every rank calls this with the same arguments.

    Args:
        target: a new or empty directory (``hf_writer.new_directory``), locked by the first rank.
        parts: the contents of each file: what ``convert`` takes, and its size in bytes.
        convert: returns named global tensors; called in worker processes.
        finish: called on the first rank with the temporary directory, to write the files next to the weights.
        job: JSON values that determine the result. A partial directory of the same job is continued.
        num_workers: worker processes of this rank.

    Raises:
        QADError: from ``convert`` or ``finish``, or an error of the disk; nothing is left behind.
    """
    partial, (rank, size) = PartialDirectory(target, job), rank_and_size()
    release = partial.path / "release"
    on_rank_0(partial.open)
    try:
        on_rank_0(lambda: release.mkdir(exist_ok=True))
        write = _Writer(partial, release, parts, convert)
        local_parts = range(rank, len(parts), size)
        run_on_all_ranks(lambda: explained(target, lambda: write.all(local_parts, num_workers, is_shown=rank == 0)))

        def complete() -> None:
            written = [Part.from_record(partial.finished(part_name(i))) for i in range(len(parts))]
            for name in {file.name for file in release.iterdir()} - {part.file for part in written}:
                (release / name).unlink()  # of a process that was killed here
            torch_dist_writer.write_index(release, written)
            shutil.rmtree(partial.path / "hf", ignore_errors=True)
            finish(partial.path)
            manifest.write_manifest(partial.path / "hf")
            manifest.write_atomically(partial.path / TRACKER, "release")
            partial.publish()

        on_rank_0(lambda: explained(target, complete))
    except QADError:
        on_rank_0(partial.remove)
        raise


def part_name(index: int) -> str:
    return f"part_{index:05d}"


class _Writer[T]:
    """Writes and verifies the parts of one checkpoint."""

    def __init__(self, partial: PartialDirectory, release: Path, parts: Sequence[Sequence[tuple[T, int]]], convert):
        self._partial, self._release, self._parts, self._convert = partial, release, parts, convert

    def all(self, indices: Sequence[int], num_workers: int, is_shown: bool) -> None:
        """Write the parts that are not there yet."""
        sizes = {i: sum(size for _, size in self._parts[i]) for i in indices}
        progress = Progress("importing", sum(sizes.values()), is_shown)
        for i, _ in worker_pool.run(list(indices), self.one, num_workers):
            progress.add(sizes[i])
        progress.finish()

    def one(self, index: int) -> None:
        """Write one part, unless an earlier process has finished it and its file is as it was."""
        name, file = part_name(index), self._release / f"__{index}_0.distcp"
        record = self._partial.finished(name)
        if record is not None and file.is_file() and manifest.sum_of(file) == (record["size"], record["sha256"]):
            return
        file.unlink(missing_ok=True)
        tensors = (tensor for item, _ in self._parts[index] for tensor in self._convert(item))
        self._partial.finish(name, torch_dist_writer.write_part(file, tensors).record())


def explained[R](target: Path, work: Callable[[], R]) -> R:
    """Return ``work()``; an error of the operating system is raised as QADError."""
    try:
        return work()
    except OSError as error:
        free = shutil.disk_usage(target.parent).free
        reason = f"{error.strerror or error}{f': {os.fspath(error.filename)}' if error.filename else ''}"
        raise QADError(
            f"{target}: not written: {reason} ({free / 1e9:.3g} GB are free there). Free space, or choose another "
            "directory."
        ) from error
