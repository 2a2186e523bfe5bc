"""Reads tensors of a torch_dist checkpoint whole, a few at a time, without building a model."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.iterations import iteration_to_read
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.models.weight_loading import AMAX, GATED_HALVES


class TorchDistReader:
    """Global tensors of one iteration in a checkpoint directory. torch.distributed must be initialized.

    Args:
        iteration: a number, "best", or None for the newest.

    Raises:
        QADError: no such iteration, or a damaged one.
    """

    def __init__(self, checkpoint: str | Path, iteration: int | str | None = None):
        self.checkpoint = Path(checkpoint)
        self.directory = iteration_to_read(checkpoint, iteration)
        manifest.verify_checkpoint(self.directory)
        self._metadata = dist_checkpointing.load_tensors_metadata(str(self.directory))

    def __contains__(self, name: str) -> bool:
        return name in self._metadata

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Whole tensors by name, each in its stored dtype."""
        split = {name for name in names if f"{name}{GATED_HALVES[0]}" in self}
        parts = {name: [f"{name}{half}" for half in GATED_HALVES] if name in split else [name] for name in names}
        loaded = self._load([part for group in parts.values() for part in group])
        return {name: torch.cat([loaded.pop(part) for part in group]) for name, group in parts.items()}

    def read_amaxes(self) -> dict[str, torch.Tensor]:
        """Every quantizer's amax, by name, at once: each ``read`` goes through the index of the whole checkpoint, which
        of a model with thousands of experts takes a second."""
        return self.read([name for name in self._metadata if name.endswith(AMAX)])

    def _load(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        for name in names:
            if name not in self:
                raise QADError(f"{self.directory}: no tensor {name!r}; it is of another architecture or damaged")
        if not names:
            return {}
        wanted = {}
        for name in names:
            stored = self._metadata[name]
            empty = torch.empty(stored.global_shape, dtype=stored.dtype)
            wanted[name] = ShardedTensor.from_rank_offsets(name, empty)
        return dist_checkpointing.load(wanted, str(self.directory), validate_access_integrity=False)

    def layers(self, maps: Sequence[ParamMapping]) -> Iterator[tuple[ParamMapping, torch.Tensor]]:
        """The tensors of ``maps`` in order, read a layer at a time; vocabulary padding cut off, shapes checked."""
        for _, group in groupby(maps, key=lambda m: m.layer):
            group = list(group)
            parts = {m.megatron: self._parts(m) for m in group}
            tensors = self.read([part for names in parts.values() for part in names])
            for m in group:
                tensor = torch.cat([tensors.pop(part) for part in parts[m.megatron]])
                if m.kind in ("embedding", "head"):
                    tensor = tensor[: m.shape[0]]
                if tuple(tensor.shape) != m.shape:
                    found = list(tensor.shape)
                    raise QADError(f"{self.directory}: {m.megatron} has shape {found}, expected {list(m.shape)}")
                yield m, tensor

    def _parts(self, tensor_map: ParamMapping) -> list[str]:
        """Names of what holds a tensor here: of the whole, if that is stored, or else of its parts."""
        if tensor_map.megatron in self:
            return [tensor_map.megatron]
        return [tensor_map.megatron + ending for ending in tensor_map.checkpoint_splits]
