"""Writes torch_dist checkpoints a file at a time, without a model and with one tensor in memory.

The result is what Megatron's ``dist_checkpointing.save`` writes: ``__N_0.distcp`` files, each a sequence of
``torch.save`` streams, ``.metadata`` with the place of every tensor, and ``metadata.json``. The SHA-256 of a file is
computed while it is written.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_qad.engine.run_directory import manifest

_SLICE_BYTES = 1 << 20  # hashed and written while it is in the cache


@dataclass(frozen=True)
class Stored:
    """The place of one tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint."""

    file: str
    size: int
    sha256: str
    tensors: tuple[Stored, ...]

    def record(self) -> dict:
        """Return the part as JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict) -> "Part":
        stored = [Stored(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in record["tensors"]]
        return cls(**{**record, "tensors": tuple(stored)})


def write_part(file: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> Part:
    """Write named global tensors to a new file. It is on the disk when this returns.

    Args:
        tensors: taken one by one; each is released before the next is taken.

    Raises:
        OSError: a full disk, or a file or link of that name exists.
    """
    stored = []
    with _HashedFile(file) as stream:
        for name, tensor in tensors:
            offset = stream.size
            torch.save(_own_storage(tensor), stream)
            stream.check()
            dtype = str(tensor.dtype).removeprefix("torch.")
            stored.append(Stored(name, dtype, tuple(tensor.shape), offset, stream.size - offset))
            del tensor
    return Part(file.name, stream.size, stream.hexdigest(), tuple(stored))


def write_index(directory: Path, parts: Sequence[Part]) -> None:
    """Write ``.metadata``, ``metadata.json``, the common state (which is empty) and the manifest of a checkpoint."""
    common = ShardedObject("common_state", {}, (1,), (0,)).unique_key
    content = io.BytesIO()
    torch.save([{}], content)
    with _HashedFile(directory / "__common_0.distcp") as stream:
        stream.write(content.getbuffer())
    sums = {part.file: (part.size, part.sha256) for part in parts}
    sums["__common_0.distcp"] = stream.size, stream.hexdigest()
    tensors = {stored.name: (part.file, stored) for part in parts for stored in part.tensors}
    places = {
        MetadataIndex(name, torch.Size([0] * len(stored.shape))): _StorageInfo(file, stored.offset, stored.length)
        for name, (file, stored) in tensors.items()
    }
    places[MetadataIndex(common)] = _StorageInfo("__common_0.distcp", 0, stream.size)
    described = {name: _describe(stored) for name, (_, stored) in tensors.items()} | {common: BytesStorageMetadata()}
    with _HashedFile(directory / ".metadata") as stream:
        stream.write(pickle.dumps(Metadata(described, storage_data=places)))
    sums[".metadata"] = stream.size, stream.hexdigest()
    strategy = TorchDistSaveShardedStrategy()
    save_config(CheckpointingConfig(strategy.backend, strategy.version), str(directory))
    sums["metadata.json"] = manifest.sum_of(directory / "metadata.json")
    manifest.write_sums(directory, sums)


def _describe(stored: Stored) -> TensorStorageMetadata:
    """Return the description of a tensor that is one chunk."""
    shape = torch.Size(stored.shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
    return TensorStorageMetadata(TensorProperties(getattr(torch, stored.dtype)), shape, [chunk])


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is all of its storage, because ``torch.save`` writes the complete storage of a view."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _HashedFile:
    """A new file that is hashed while it is written.

    An error of a write is raised by ``check`` or at the end, not by ``write``: torch calls that from code that cannot
    pass an exception on.
    """

    def __init__(self, file: Path):
        self._file, self._hash, self._error, self.size = file, hashlib.sha256(), None, 0

    def __enter__(self) -> "_HashedFile":
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
        self._stream = os.fdopen(os.open(self._file, flags, 0o666), "wb")
        return self

    def __exit__(self, kind, *_) -> None:
        with self._stream:
            if kind is None:
                self.check()
                self._stream.flush()
                os.fsync(self._stream.fileno())

    def write(self, data) -> int:
        data = memoryview(data).cast("B")
        try:
            for start in range(0, len(data) if self._error is None else 0, _SLICE_BYTES):
                piece = data[start : start + _SLICE_BYTES]
                self._hash.update(piece)
                self._stream.write(piece)
        except OSError as error:
            self._error = error
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """For ``torch.save``; the end flushes."""

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
