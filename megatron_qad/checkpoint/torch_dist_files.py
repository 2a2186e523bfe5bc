"""Reads single tensors from the files of a torch_dist checkpoint.

``torch.distributed.checkpoint.load`` is a collective operation that reads ``.metadata`` each time it is called, which
takes a second for thousands of experts. A conversion reads one tensor at a time in processes of its own, so here the
metadata is read once, and a tensor is put together from the chunks that the ranks of a job saved.
"""

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.restricted_unpickling import one_error


class TorchDistFiles:
    """The files of one iteration. Its manifest must have been verified.

    Example::

        files = TorchDistFiles(Path("checkpoints/teacher/release"))
        weight = files.read("decoder.final_norm.weight")  # Tensor [hidden]
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._reader = FileSystemReader(str(directory))
        with one_error():
            metadata = self._reader.read_metadata()  # with restricted unpickling
        self._places = metadata.storage_data
        self._tensors = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> Iterator[str]:
        """Names of all tensors."""
        return iter(self._tensors)

    def find(self, name: str) -> TensorStorageMetadata:
        """Return the description of a tensor. Raises QADError if there is none of that name."""
        if name not in self._tensors:
            raise QADError(
                f"{self.directory}: no tensor {name!r}. The checkpoint does not match hf/config.json or is damaged."
            )
        return self._tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """Return a global tensor in its stored dtype.

        Raises:
            QADError: there is none of that name, its chunks do not cover it, or its file cannot be read.
        """
        stored = self.find(name)
        if sum(chunk.sizes.numel() for chunk in stored.chunks) != stored.size.numel():
            raise QADError(f"{self.directory}: {name} is incomplete. Use another checkpoint.")
        result = None
        for chunk in stored.chunks:
            values = self._read_chunk(name, chunk.offsets)
            if values.shape != chunk.sizes or values.dtype != stored.properties.dtype:
                raise QADError(f"{self.directory}: {name} does not match the index. Use another checkpoint.")
            if chunk.sizes == stored.size:
                return values
            result = torch.empty(stored.size, dtype=stored.properties.dtype) if result is None else result
            result[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = values
        return torch.empty(stored.size, dtype=stored.properties.dtype) if result is None else result

    def _read_chunk(self, name: str, offsets: torch.Size) -> torch.Tensor:
        place = self._places[MetadataIndex(name, offsets)]
        file = self.directory / place.relative_path
        try:
            with one_error(), self._reader.fs.create_stream(file, "rb") as stream:  # opens no file outside
                view = _create_file_view(stream, place.offset, place.length)
                return torch.load(view, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise QADError(f"{file}: cannot read {name}: {error}. Use another checkpoint.") from error
