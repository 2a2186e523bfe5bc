"""Read global tensors of a torch_dist checkpoint, one at a time, without building a model."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_qad.checkpoint.torch_dist_files import TorchDistFiles
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.iterations import iteration_to_read
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.models.weight_loading import AMAX, GATED_HALVES
from megatron_qad.quantization.calibration import largest_over_experts
from megatron_qad.quantization.carried_scales import BLOCK_SCALES, stored_name


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
        self._files = TorchDistFiles(self.directory)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def stored_dtype(self, tensor_map: ParamMapping) -> torch.dtype:
        """Return the dtype of a tensor. Raises QADError if there is none of that name."""
        name = self._stored_names(tensor_map)[0]
        half = f"{name}{GATED_HALVES[0]}"
        return self._files.find(half if half in self else name).properties.dtype

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return global tensors by name, in their stored dtypes; Megatron's gate and up halves are joined."""
        split = {name for name in names if f"{name}{GATED_HALVES[0]}" in self}
        parts = {name: [f"{name}{half}" for half in GATED_HALVES] if name in split else [name] for name in names}
        return {name: _joined([self._files.read(part) for part in group]) for name, group in parts.items()}

    def read_amaxes(self) -> dict[str, torch.Tensor]:
        """Return the amax of every quantizer by name; that of an input is the same for all experts of a layer."""
        return largest_over_experts(self.read([name for name in self._files.names if name.endswith(AMAX)]))

    def read_carried(self, tensor_map: ParamMapping, what: str) -> torch.Tensor:
        """Return a tensor that is stored next to a weight, in its parts and without vocabulary padding.

        Args:
            what: last part of its name, as "weight" is that of the weight's (``quantization.carried_scales``).
        """
        name = stored_name(tensor_map.megatron, what)
        names = [name]
        if name not in self and f"{name}{GATED_HALVES[0]}" not in self:
            endings = [e for e in tensor_map.checkpoint_splits if f"{name}{e}" in self]
            names = [f"{name}{ending}" for ending in endings] or names
        tensor = _joined([tensor for name in names for tensor in self.read([name]).values()])
        is_padded = tensor_map.kind == "head" and what == BLOCK_SCALES
        return tensor[: tensor_map.shape[0]] if is_padded else tensor

    def layers(self, maps: Sequence[ParamMapping]) -> Iterator[tuple[ParamMapping, torch.Tensor]]:
        """Yield the tensors of ``maps`` in order, read one by one, without vocabulary padding, shapes checked."""
        for m in maps:
            names = self._stored_names(m)
            tensor = _joined([tensor for name in names for tensor in self.read([name]).values()])
            if m.kind in ("embedding", "head"):
                tensor = tensor[: m.shape[0]]
            if tuple(tensor.shape) != m.shape:
                shape = list(tensor.shape)
                raise QADError(f"{self.directory}: {m.megatron} has shape {shape}, expected {list(m.shape)}.")
            yield m, tensor
            del tensor  # before the next one is read

    def _stored_names(self, tensor_map: ParamMapping) -> list[str]:
        """Return the names under which a tensor is stored: its own, or those of its parts."""
        if tensor_map.megatron in self:
            return [tensor_map.megatron]
        return [tensor_map.megatron + ending for ending in tensor_map.checkpoint_splits]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
