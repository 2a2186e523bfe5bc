"""Loads the weights of a torch_dist checkpoint into a model of any parallel layout.

For checkpoints made by ``tools/import_hf.py`` or saved by a QAD job. Only weights are read: optimizer state and the
quantizers' amaxes of a job that resumes are Megatron's ``load_checkpoint``'s to load.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.utils import unwrap_model

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.iterations import iteration_dir

# Megatron's training loop stores gate and up of a gated MLP as two tensors with these endings (the metadata key
# "singleton_local_shards"); the importer, as Megatron's default, as the two halves of one.
GATED_HALVES = ("_w", "_v")
_EXTRA_STATE = "_extra_state"  # of Transformer Engine's and modelopt's modules: made anew, never loaded
_QUANTIZER = "_quantizer."
AMAX = "_quantizer._amax"


def stored_shapes(checkpoint: str | Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in a checkpoint, by name."""
    metadata = dist_checkpointing.load_tensors_metadata(str(iteration_dir(checkpoint)))
    return {name: tuple(tensor.global_shape) for name, tensor in metadata.items()}


def has_amaxes(checkpoint: str | Path) -> bool:
    """Whether a checkpoint holds calibrated quantizers, of inputs or of the KV cache."""
    return any(name.endswith(AMAX) for name in stored_shapes(checkpoint))


def load_weights(chunks: Sequence[torch.nn.Module], checkpoint: str | Path, *, with_amaxes: bool = False) -> None:
    """Fill the model chunks (one a virtual stage) with the weights of ``checkpoint``.

    Args:
        with_amaxes: also the input quantizers' amaxes, whose buffers must be there (``expect_amax``).

    Raises:
        QADError: a damaged checkpoint; a tensor of the model that it lacks, or one of another shape; named.
    """
    manifest.verify_checkpoint(iteration_dir(checkpoint))
    stored = stored_shapes(checkpoint)
    left_out = (_EXTRA_STATE,) if with_amaxes else (_EXTRA_STATE, _QUANTIZER)
    # Experts are always stored like that, and say nothing of the other MLPs.
    dense = [name for name in stored if ".experts.experts." not in name]
    metadata = {"singleton_local_shards": any(name.endswith(".weight" + GATED_HALVES[0]) for name in dense)}
    for chunk in unwrap_model(list(chunks)):
        sharded = {
            name: tensor
            for name, tensor in chunk.sharded_state_dict(metadata=metadata).items()
            if not any(part in name for part in left_out)
        }
        _check(sharded, stored, checkpoint)
        loaded = dist_checkpointing.load(sharded, str(iteration_dir(checkpoint)))
        loaded = {name: loaded[name] for name in sharded}  # a job's checkpoint also has args, iteration, ...
        missing, unexpected = chunk.load_state_dict(loaded, strict=False)
        wrong = [n for n in missing if not any(part in n for part in (_EXTRA_STATE, _QUANTIZER))] + list(unexpected)
        if wrong:
            raise QADError(f"{checkpoint}: tensors that the model and the checkpoint do not share: {wrong[:5]}")


def weights_to_save(chunks: Sequence[torch.nn.Module]) -> dict:
    """The sharded state dict of the chunks' weights, gate and up as the halves of one tensor, as the importer has
    them."""
    found = {}
    for i, chunk in enumerate(unwrap_model(list(chunks))):
        sharded = chunk.sharded_state_dict(metadata={"singleton_local_shards": False})
        found |= {f"{i}.{name}": x for name, x in sharded.items() if _EXTRA_STATE not in name}
    return found


def _check(sharded: dict, stored: dict[str, tuple[int, ...]], checkpoint) -> None:
    for tensor in _tensors(sharded):
        key, shape = tensor.key, tuple(tensor.global_shape)
        if key not in stored:
            raise QADError(f"{checkpoint}: no tensor {key!r}; the checkpoint is of another architecture")
        # Rows of vocabulary padding differ with the tensor-parallel size and may.
        if not tensor.allow_shape_mismatch and shape != stored[key]:
            raise QADError(f"{checkpoint}: {key} has shape {list(stored[key])}, the model expects {list(shape)}")


def _tensors(sharded: dict) -> Iterator[ShardedTensor]:
    """The tensors of a sharded state dict, those included that are stored in parts (gate and up, Mamba's rows)."""
    for value in sharded.values():
        built = value.build() if isinstance(value, ShardedTensorFactory) else value
        yield from (leaf for leaf in nested_values([built]) if isinstance(leaf, ShardedTensor))
