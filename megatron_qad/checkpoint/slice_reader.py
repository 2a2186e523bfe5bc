"""Read slices of the tensors in any torch_dist checkpoint, such as one layer of a tensor that holds all layers.

Megatron's own loading needs all ranks that share a tensor. This reader is for one process, with torch's planner
interface: it asks for the parts of the files that overlap a slice.
"""

import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_qad.engine.errors import QADError

READ_ERRORS = (CheckpointException, pickle.UnpicklingError, EOFError, OSError, RuntimeError, KeyError)
"""What torch raises for files that are missing, cut off or changed."""


@dataclass(frozen=True)
class Stored:
    """Global shape and dtype of a tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Slice:
    """A part of a stored tensor: ``tensor[offsets : offsets + sizes]`` on every axis."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class SliceReader:
    """Reader of the tensors of one iteration.

    Raises:
        QADError: files that are missing, cut off or not a checkpoint's.

    Example::

        reader = SliceReader(Path("runs/gpt/iter_0000010"))
        shape = reader.stored["decoder.layers.mlp.linear_fc2.weight"].shape  # (layers, hidden, ffn)
        (third,) = reader.read([Slice("decoder.layers.mlp.linear_fc2.weight", (2, 0, 0), (1, *shape[1:]))])
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._files = _Files(directory)

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """Every tensor by name. Objects that are not tensors are left out."""
        try:
            entries = self._files.read_metadata().state_dict_metadata
        except (AttributeError, *READ_ERRORS) as error:
            raise self._unreadable(error) from error
        tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        return {name: Stored(tuple(entry.size), entry.properties.dtype) for name, entry in tensors.items()}

    def read(self, slices: Sequence[Slice]) -> list[torch.Tensor]:
        """Return the slices in order, in their stored dtypes."""
        tensors = {part: torch.empty(part.sizes, dtype=self.stored[part.name].dtype) for part in slices}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is intended
                checkpoint.load({}, storage_reader=self._files, planner=_Planner(tensors), no_dist=True)
        except READ_ERRORS as error:
            raise self._unreadable(error) from error
        return [tensors[part] for part in slices]

    def _unreadable(self, error: BaseException) -> QADError:
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return QADError(f"{self.directory}: cannot be read ({reason}). Copy the checkpoint again.")


class _Files(checkpoint.FileSystemReader):
    """``FileSystemReader`` that reads the index once: with thousands of experts it takes a second."""

    @cached_property
    def _index(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._index


class _Planner(LoadPlanner):
    """Loads into ``tensors`` (slice -> tensor of its sizes)."""

    def __init__(self, tensors: dict[Slice, torch.Tensor]):
        self._tensors = tensors

    def set_up_planner(self, state_dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self._entries = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items = []
        for part in self._tensors:
            chunk = ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes))
            found = create_read_items_for_chunk_list(part.name, self._entries[part.name], [chunk])
            num_found = sum(item.lengths.numel() for item in found)
            if num_found != chunk.sizes.numel():
                raise QADError(f"{part.name}: {num_found} of {chunk.sizes.numel()} values of a part are in the files")
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        self._by_place = {(part.name, part.offsets): tensor for part, tensor in self._tensors.items()}
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor = self._by_place[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(axis, start, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # resolve_tensor returned a view

    def load_bytes(self, read_item: ReadItem, value) -> None:
        raise AssertionError("only tensors are planned")
