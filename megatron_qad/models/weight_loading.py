"""Loading the weights of a torch_dist checkpoint into a model with any parallelism.

Checkpoints come from an import (``megatron-qad import``, ``megatron-qad import``) or from a QAD job. Only weights
are read. When a job resumes, Megatron's ``load_checkpoint`` loads the optimizer state and the quantizer amaxes.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
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
from megatron_qad.engine.run_directory.restricted_unpickling import one_error

# Megatron's training loop saves gate and up of a gated MLP as two tensors with these endings (metadata key
# "singleton_local_shards"). The importer saves them as the halves of one tensor, which is Megatron's default.
GATED_HALVES = ("_w", "_v")
_EXTRA_STATE = "_extra_state"  # of Transformer Engine and modelopt modules; recreated, never loaded
_QUANTIZER = "_quantizer."
AMAX = "_quantizer._amax"
_CARRIED = "carried_scales."  # quantization.carried_scales


def stored_shapes(checkpoint: str | Path, iteration: int | str | None = None) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every tensor in a checkpoint by name."""
    with one_error():
        metadata = dist_checkpointing.load_tensors_metadata(str(iteration_dir(checkpoint, iteration)))
    return {name: tuple(tensor.global_shape) for name, tensor in metadata.items()}


def has_amaxes(checkpoint: str | Path) -> bool:
    """Whether a checkpoint contains calibrated quantizers of inputs or of the KV cache."""
    return any(name.endswith(AMAX) for name in stored_shapes(checkpoint))


def load_weights(
    chunks: Sequence[torch.nn.Module],
    checkpoint: str | Path,
    *,
    with_amaxes: bool = False,
    is_whole: bool = True,
    iteration: int | str | None = None,
) -> None:
    """Load the weights of ``checkpoint`` into model chunks, one per virtual pipeline stage.

    Args:
        with_amaxes: also load the amaxes of the input quantizers and carried scales of weights, whose buffers must
            exist (``expect_amax``, ``InPlaceWeights``).
        is_whole: whether the chunks of all ranks are the whole model. An output layer that is tied to an embedding,
            which Megatron expects on another rank, is otherwise an error.
        iteration: as in ``iteration_dir``.

    Raises:
        QADError: the checkpoint is damaged, lacks a tensor of the model, or has a tensor of another shape.

    Example::

        chunks = build_chunks(model_config(job.config, job.args, job.config.student))
        load_weights(chunks, job.config.student.checkpoint)
    """
    directory = iteration_dir(checkpoint, iteration)
    manifest.verify_checkpoint(directory)
    stored = stored_shapes(checkpoint, iteration)
    # Virtual stages are loaded one after the other, so that a tied output layer is read without its embedding, too.
    is_whole = is_whole and len(chunks) == 1
    for chunk in unwrap_model(list(chunks)):
        sharded = _sharded_weights(chunk, stored, with_amaxes)
        _check_shapes(sharded, stored, checkpoint)
        with one_error():
            loaded = dist_checkpointing.load(sharded, str(directory), validate_access_integrity=is_whole)
        loaded = {name: loaded[name] for name in sharded}  # a job's checkpoint also has args, iteration, ...
        missing, unexpected = chunk.load_state_dict(loaded, strict=False)
        left_out = (_EXTRA_STATE, _QUANTIZER, _CARRIED)
        not_shared = [n for n in missing if not any(part in n for part in left_out)] + list(unexpected)
        if not_shared:
            raise QADError(f"{checkpoint}: tensors that are not in both model and checkpoint: {not_shared[:5]}.")


def load_quantizers(
    chunks: Sequence[torch.nn.Module], checkpoint: str | Path, *, iteration: int | str | None = None
) -> None:
    """Load the amaxes of quantizers and the carried scales of weights, whose buffers must exist, without the weights.

    modelopt makes the MLPs of a quantized model expect gate and up as two tensors, however a checkpoint stores them. A
    model whose weights are loaded before its quantizers are added can be loaded from every checkpoint.

    Raises:
        QADError: as in ``load_weights``.
    """
    directory, stored = iteration_dir(checkpoint, iteration), stored_shapes(checkpoint, iteration)
    for chunk in unwrap_model(list(chunks)):
        sharded = _sharded_weights(chunk, stored, with_amaxes=True)
        sharded = {name: x for name, x in sharded.items() if _QUANTIZER in name or _CARRIED in name}
        _check_shapes(sharded, stored, checkpoint)
        with one_error():
            loaded = dist_checkpointing.load(sharded, str(directory), validate_access_integrity=False)
        chunk.load_state_dict({name: loaded[name] for name in sharded}, strict=False)


def fill_weights(
    chunks: Sequence[torch.nn.Module], read: Callable[[str, torch.dtype], torch.Tensor], source: str | Path
) -> None:
    """Copy weights into model chunks from a source other than a torch_dist checkpoint. Every rank reads what it needs.

    Args:
        read: returns a tensor by the name under which a checkpoint stores it: the global tensor, without vocabulary
            padding, best in the given dtype. Parts of one weight follow each other.
        source: its name, for errors.

    Raises:
        QADError: a tensor has another shape than the model expects.
    """
    for chunk in unwrap_model(list(chunks)):
        for shard in _tensors(_sharded_weights(chunk, stored=())):
            tensor = read(shard.key, shard.data.dtype)
            if not shard.allow_shape_mismatch and tuple(tensor.shape) != tuple(shard.global_shape):
                raise QADError(
                    f"{source}: {shard.key} has shape {list(tensor.shape)}, the model expects "
                    f"{list(shard.global_shape)}."
                )
            _copy_shard(shard, tensor)


@torch.no_grad()
def _copy_shard(shard: ShardedTensor, tensor: torch.Tensor) -> None:
    """Copy this rank's part of a global tensor. Rows past its end, which are vocabulary padding, become zero."""
    assert not shard.prepend_axis_num, f"{shard.key}: layers in one tensor are not supported"
    ends = [start + size for start, size in zip(shard.global_offset, shard.local_shape, strict=True)]
    part = tensor[tuple(slice(start, end) for start, end in zip(shard.global_offset, ends, strict=True))]
    if part.dim():
        shard.data[part.shape[0] :] = 0
    shard.data[tuple(slice(size) for size in part.shape)] = part.to(shard.data.device)


def _sharded_weights(chunk: torch.nn.Module, stored: Collection[str], with_amaxes: bool = False) -> dict:
    """Return the sharded state dict of a chunk's weights in the form in which a checkpoint stores them.

    Args:
        stored: names of the tensors in the checkpoint.
    """
    skipped = (_EXTRA_STATE,) if with_amaxes else (_EXTRA_STATE, _QUANTIZER, _CARRIED)
    # Experts are always saved as two tensors, so they do not show how the other MLPs are saved.
    non_expert = [name for name in stored if ".experts.experts." not in name]
    metadata = {"singleton_local_shards": any(name.endswith(".weight" + GATED_HALVES[0]) for name in non_expert)}
    sharded = chunk.sharded_state_dict(metadata=metadata)
    return {name: tensor for name, tensor in sharded.items() if not any(part in name for part in skipped)}


def stored_dtypes(checkpoint: str | Path) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor in a checkpoint by name."""
    metadata = dist_checkpointing.load_tensors_metadata(str(iteration_dir(checkpoint)))
    return {name: tensor.dtype for name, tensor in metadata.items()}


def weight_dtypes(chunk: torch.nn.Module, stored: Collection[str]) -> dict[str, torch.dtype]:
    """Return the dtype of a chunk's weights by the names under which a checkpoint stores them.

    Args:
        stored: names of the tensors in the checkpoint.
    """
    return {tensor.key: tensor.dtype for tensor in _tensors(_sharded_weights(unwrap_model(chunk), stored))}


def quantizers_to_save(chunk: torch.nn.Module) -> dict:
    """Return the part of a chunk's sharded state dict that ``load_weights`` does not load: its quantizers' amaxes, and
    carried scales of its weights, in host memory and without a reference to the weights."""
    sharded = unwrap_model(chunk).sharded_state_dict()
    state = {name: x for name, x in sharded.items() if any(part in name for part in (_EXTRA_STATE, _QUANTIZER))}
    carried = {name: x for name, x in sharded.items() if _CARRIED in name}
    for tensor in (tensors := list(_tensors(carried))):
        tensor.data = tensor.data.cpu()
    return state | {f"{_CARRIED}{tensor.key}.{tensor.global_offset}": tensor for tensor in tensors}


def weights_to_save(chunks: Sequence[torch.nn.Module]) -> dict:
    """Return the sharded state dict of the chunks' weights, with gate and up as the halves of one tensor."""
    weights = {}
    for i, chunk in enumerate(unwrap_model(list(chunks))):
        sharded = chunk.sharded_state_dict(metadata={"singleton_local_shards": False})
        weights |= {f"{i}.{name}": x for name, x in sharded.items() if _EXTRA_STATE not in name}
    return weights


def _check_shapes(sharded: dict, stored: dict[str, tuple[int, ...]], checkpoint) -> None:
    for tensor in _tensors(sharded):
        key, shape = tensor.key, tuple(tensor.global_shape)
        if key not in stored:
            raise QADError(
                f"{checkpoint}: no tensor {key!r}. The checkpoint and the model have different architectures."
            )
        # Vocabulary padding depends on the tensor-parallel size, so it may differ.
        if not tensor.allow_shape_mismatch and shape != stored[key]:
            raise QADError(f"{checkpoint}: {key} has shape {list(stored[key])}, the model expects {list(shape)}.")


def _tensors(sharded: dict) -> Iterator[ShardedTensor]:
    """Yield the tensors of a sharded state dict, including those saved in parts (gate and up, Mamba components)."""
    for value in sharded.values():
        tensors = value.build() if isinstance(value, ShardedTensorFactory) else value
        yield from (leaf for leaf in nested_values([tensors]) if isinstance(leaf, ShardedTensor))
