"""Read global tensors of a torch_dist checkpoint, a few at a time, without building a model."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.iterations import iteration_to_read
from megatron_qad.engine.run_directory.restricted_unpickling import one_error
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.models.weight_loading import AMAX, GATED_HALVES
from megatron_qad.quantization.calibration import largest_over_experts


class TorchDistReader:
    """Reader of the global tensors of one iteration in a checkpoint. torch.distributed must be initialized.

    Args:
        checkpoint: checkpoint directory.
        iteration: a number, "best", or None for the newest.

    Raises:
        QADError: a missing or damaged iteration.

    Example::

        init_process_group()  # megatron_qad.engine.distributed
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        weight = TorchDistReader("checkpoints/teacher").read([name])[name]  # Tensor [q + k + v rows, hidden]
    """

    def __init__(self, checkpoint: str | Path, iteration: int | str | None = None):
        self.checkpoint = Path(checkpoint)
        self.directory = iteration_to_read(checkpoint, iteration)
        manifest.verify_checkpoint(self.directory)
        with one_error():
            self._metadata = dist_checkpointing.load_tensors_metadata(str(self.directory))

    def __contains__(self, name: str) -> bool:
        return name in self._metadata

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return global tensors by name, in their stored dtypes; Megatron's gate and up halves are joined."""
        split = {name for name in names if f"{name}{GATED_HALVES[0]}" in self}
        parts = {name: [f"{name}{half}" for half in GATED_HALVES] if name in split else [name] for name in names}
        loaded = self._load([part for group in parts.values() for part in group])
        return {name: torch.cat([loaded.pop(part) for part in group]) for name, group in parts.items()}

    def read_amaxes(self) -> dict[str, torch.Tensor]:
        """Return the amax of every quantizer by name; that of an input is the same for all experts of a layer.

        They are read at once because each ``read`` loads the index of the checkpoint, which takes a second for a model
        with thousands of experts."""
        return largest_over_experts(self.read([name for name in self._metadata if name.endswith(AMAX)]))

    def _load(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        for name in names:
            if name not in self:
                raise QADError(
                    f"{self.directory}: no tensor {name!r}. The checkpoint does not match hf/config.json or is damaged."
                )
        if not names:
            return {}
        requested = {}
        for name in names:
            stored = self._metadata[name]
            empty = torch.empty(stored.global_shape, dtype=stored.dtype)
            requested[name] = ShardedTensor.from_rank_offsets(name, empty)
        with one_error():
            return dist_checkpointing.load(requested, str(self.directory), validate_access_integrity=False)

    def layers(self, maps: Sequence[ParamMapping]) -> Iterator[tuple[ParamMapping, torch.Tensor]]:
        """Yield the tensors of ``maps`` in order, read layer by layer, without vocabulary padding, shapes checked."""
        for _, group in groupby(maps, key=lambda m: m.layer):
            group = list(group)
            parts = {m.megatron: self._stored_names(m) for m in group}
            tensors = self.read([part for names in parts.values() for part in names])
            for m in group:
                tensor = torch.cat([tensors.pop(part) for part in parts[m.megatron]])
                if m.kind in ("embedding", "head"):
                    tensor = tensor[: m.shape[0]]
                if tuple(tensor.shape) != m.shape:
                    shape = list(tensor.shape)
                    raise QADError(f"{self.directory}: {m.megatron} has shape {shape}, expected {list(m.shape)}.")
                yield m, tensor

    def _stored_names(self, tensor_map: ParamMapping) -> list[str]:
        """Return the names under which a tensor is stored: its own, or those of its parts."""
        if tensor_map.megatron in self:
            return [tensor_map.megatron]
        return [tensor_map.megatron + ending for ending in tensor_map.checkpoint_splits]
