"""Writes the shards of a Hugging Face checkpoint from tensors that worker processes convert one at a time.

Names, dtypes and shapes are known before anything is converted, so every tensor has its place in a shard, and workers
write there in any order. A rank writes every n-th shard. A shard whose tensors are all written is hashed, and a
conversion that was killed continues after those shards. Meanwhile a thread sends what is written to the disk, so that
no worker waits for gigabytes at the end of a shard.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_qad.checkpoint import worker_pool
from megatron_qad.checkpoint.hf_writer import shard_names
from megatron_qad.checkpoint.partial_directory import PartialDirectory
from megatron_qad.checkpoint.progress import Progress
from megatron_qad.checkpoint.safetensors_file import Layout, Spec, num_bytes
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest

_TASK_BYTES = 64 << 20  # small tensors, such as those of experts, are converted several at a time


@dataclass(frozen=True)
class Piece[T]:
    """Tensors that are converted together."""

    source: T
    """What is converted."""
    num_bytes: int
    """Size of the source."""
    specs: Mapping[str, Spec]
    """Name -> dtype and shape of the results."""


@dataclass(frozen=True)
class ShardPlan[T]:
    """The shards of one checkpoint."""

    pieces: Sequence[Piece[T]]
    names: Sequence[str]
    """File name of each shard."""
    weight_map: Mapping[str, int]
    """Tensor name -> number of its shard."""
    layouts: Sequence[Layout]
    num_bytes: int
    """Size of all tensors."""

    @classmethod
    def of(cls, pieces: Sequence[Piece[T]], max_shard_bytes: int) -> "ShardPlan[T]":
        """Divide the tensors, in their order, into shards. A larger tensor gets its own shard.

        Raises:
            QADError: a name occurs twice, or there is no tensor.
        """
        shards: list[dict[str, Spec]] = []
        weight_map: dict[str, int] = {}
        size = 0
        for name, spec in ((name, spec) for piece in pieces for name, spec in piece.specs.items()):
            if name in weight_map:
                raise QADError(f"{name}: is exported twice. Check the model's config.json.")
            if not shards or size + num_bytes(spec) > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = spec
            weight_map[name] = len(shards) - 1
            size += num_bytes(spec)
        if not shards:
            raise QADError("no tensor is exported. Check the model's config.json.")
        total = sum(num_bytes(spec) for shard in shards for spec in shard.values())
        return cls(pieces, shard_names(len(shards)), weight_map, [Layout.of(shard) for shard in shards], total)

    def shards_of(self, piece: int) -> set[int]:
        return {self.weight_map[name] for name in self.pieces[piece].specs}

    def tasks(self, shards: set[int]) -> list[tuple[int, ...]]:
        """Return the pieces of ``shards``, in tasks of pieces of the same shards."""
        tasks: list[tuple[int, ...]] = []
        size, last = 0, None
        for index, piece in enumerate(self.pieces):
            if not (touched := self.shards_of(index) & shards):
                continue
            if touched != last or size + piece.num_bytes > _TASK_BYTES:
                tasks.append(())
                size, last = 0, touched
            tasks[-1] += (index,)
            size += piece.num_bytes
        return tasks


class ShardWriter[T]:
    """Writes this rank's shards.

    Args:
        plan: equal on all ranks.
        partial: open partial directory.
        convert: returns the tensors of a piece's source by name; called in worker processes.
    """

    def __init__(
        self,
        plan: ShardPlan[T],
        partial: PartialDirectory,
        convert: Callable[[T], Iterable[tuple[str, torch.Tensor]]],
    ):
        self._plan, self._partial, self._convert = plan, partial, convert
        self._unfinished: set[int] = set()

    def write(self, shards: Iterable[int], num_workers: int, is_shown: bool) -> None:
        """Write the shards that an earlier process has not finished. Raises OSError, and QADError of ``convert``."""
        shards, plan = list(shards), self._plan
        kept = {shard for shard, is_kept in worker_pool.run(shards, self._is_finished, num_workers) if is_kept}
        self._unfinished = set(shards) - kept
        for shard in self._unfinished:
            self._file(shard).unlink(missing_ok=True)
            plan.layouts[shard].create(self._file(shard))
        tasks = plan.tasks(self._unfinished)
        missing = Counter(shard for task in tasks for shard in self._touched(task))
        progress = Progress("exporting", sum(plan.pieces[i].num_bytes for task in tasks for i in task), is_shown)
        queue: deque[tuple[int, ...] | int] = deque(tasks)
        with _background_sync() as sync:
            for task, _ in worker_pool.run(queue, self._do, num_workers):
                if isinstance(task, int):
                    continue
                progress.add(sum(plan.pieces[i].num_bytes for i in task))
                for shard in self._touched(task):
                    sync(self._file(shard))
                    missing[shard] -= 1
                    if not missing[shard]:
                        queue.appendleft(shard)
        progress.finish()

    def sums(self) -> dict[str, manifest.Sum]:
        """Return the sums of the shards of all ranks, after all have written theirs."""
        records = [self._partial.finished(name) for name in self._plan.names]
        return {name: (r["size"], r["sha256"]) for name, r in zip(self._plan.names, records, strict=True)}

    def _touched(self, task: tuple[int, ...]) -> set[int]:
        return self._plan.shards_of(task[0]) & self._unfinished

    def _file(self, shard: int) -> Path:
        return self._partial.path / self._plan.names[shard]

    def _is_finished(self, shard: int) -> bool:
        record, file = self._partial.finished(self._plan.names[shard]), self._file(shard)
        return record is not None and file.is_file() and manifest.sum_of(file) == (record["size"], record["sha256"])

    def _do(self, task: tuple[int, ...] | int) -> None:
        """Convert and write pieces, or finish a complete shard."""
        if isinstance(task, int):
            manifest.sync(self._file(task))
            size, sha256 = manifest.sum_of(self._file(task))
            return self._partial.finish(self._plan.names[task], {"size": size, "sha256": sha256})
        streams = {shard: open(self._file(shard), "r+b", buffering=0) for shard in self._touched(task)}
        try:
            for index in task:
                piece = self._plan.pieces[index]
                missing = set(piece.specs)
                for name, tensor in self._convert(piece.source):
                    missing.remove(name)
                    shard = self._plan.weight_map[name]
                    if shard in streams:
                        self._plan.layouts[shard].write(streams[shard].fileno(), name, tensor)
                if missing:
                    raise ValueError(f"{missing} are not among the converted tensors")
        finally:
            for stream in streams.values():
                stream.close()


@contextmanager
def _background_sync() -> Iterator[Callable[[Path], None]]:
    """Context manager whose value starts to write a file to the disk in a thread, unless the thread is busy.

    A failed write raises OSError in the next call or at the end: the system reports it only once, to the thread.
    """
    running: list[Future] = []
    with ThreadPoolExecutor(1) as pool:

        def sync(file: Path) -> None:
            if running and not running[0].done():
                return
            for future in running:
                future.result()
            running[:] = [pool.submit(manifest.sync, file)]

        yield sync
        for future in running:
            future.result()
