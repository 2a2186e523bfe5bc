"""Scales of weights that a checkpoint carries, because they cannot be found again from the weights.

Two kinds of weights have them: those with frozen scales (amax and block scales), and those whose scale rule does not
preserve the amax (``NumberFormat.preserves_amax``; amax only). The scales are buffers of a module next to the layers.
In checkpoints, the block scales of a weight are divided over the ranks as the weight is, so that they load with any
parallelism: rows of q, k and v, halves of gate and up, parts of a Mamba projection, and experts under their global
index.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

CHILD = "carried_scales"
"""Name of the module in a model chunk."""
AMAX, BLOCK_SCALES = "weight_amax", "weight_block_scales"
"""Last parts of the names in checkpoints, next to "weight"."""


def stored_name(weight: str, what: str) -> str:
    """Return the name of a weight's amax or block scales in a checkpoint, from the global name of the weight."""
    return f"{weight.removesuffix('weight')}{what}"


@dataclass(frozen=True)
class CarriedModule:
    """A module whose weights have carried scales."""

    module: torch.nn.Module
    """A linear with a weight [out, in], or all local experts' linears with [experts, out, in] and ``first_expert``."""
    block_size: int | None
    """Number of elements of a block, if the block scales are carried. None: the amax only."""
    tp_rank: int
    """Rank in the tensor-parallel group that shards the weight."""


class CarriedScales(torch.nn.Module):
    """The carried scales of a model chunk. It becomes a child of the chunk, which saves and loads it.

    Args:
        chunk: an unwrapped model chunk.
        modules: by their names in the chunk.
    """

    def __init__(self, chunk: torch.nn.Module, modules: Mapping[str, CarriedModule]):
        super().__init__()
        self._chunk = (chunk,)  # in a tuple, so that it does not become a child
        self._modules_by_name = dict(modules)
        for name, carried in modules.items():
            weight = carried.module.weight
            num_weights = 1 if weight.dim() == 2 else len(weight)
            amax = torch.full((num_weights,), torch.nan, dtype=torch.float32, device=weight.device)
            self.register_buffer(_buffer(name, AMAX), amax)
            if carried.block_size is not None:
                shape = (*weight.shape[:-1], weight.shape[-1] // carried.block_size)
                scales = torch.zeros(shape, dtype=torch.uint8, device=weight.device)
                self.register_buffer(_buffer(name, BLOCK_SCALES), scales)
        chunk.add_module(CHILD, self)

    def amax(self, name: str, expert: int | None) -> Tensor:
        """Return the amax of a weight over all its shards, float32 [], as a view. NaN: not known yet.

        Args:
            name: name of the module in the chunk.
            expert: index among the local experts; None for a 2-D weight.
        """
        return self.get_buffer(_buffer(name, AMAX))[expert or 0]

    def block_scales(self, name: str, expert: int | None) -> Tensor:
        """Return the block scales of a weight's shard, float8_e4m3fn [out, in / block size], as a view."""
        scales = self.get_buffer(_buffer(name, BLOCK_SCALES)).view(torch.float8_e4m3fn)
        return scales if expert is None else scales[expert]

    def _apply(self, fn, recurse=True):
        # Converting a model to BF16 also converts its buffers; amaxes stay in float32.
        amaxes = {name: x for name, x in self.named_buffers() if x.is_floating_point()}
        super()._apply(fn, recurse)
        for name, amax in amaxes.items():
            self._buffers[name] = amax.to(self._buffers[name].device)
        return self

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict:
        """Return the sharded state, derived from that of the weights."""
        weights = self._sharded_weights(prefix.removesuffix(f"{CHILD}."), metadata)
        state = {}
        for name, carried in self._modules_by_name.items():
            weight = weights[f"{name}.weight"]
            amax = self.get_buffer(_buffer(name, AMAX))
            state[f"{prefix}{_buffer(name, AMAX)}"] = _sharded_amax(weight, amax, carried)
            if carried.block_size is not None:
                scales = self.get_buffer(_buffer(name, BLOCK_SCALES))
                state[f"{prefix}{_buffer(name, BLOCK_SCALES)}"] = _sharded_scales(weight, scales, carried.block_size)
        return state

    def _sharded_weights(self, prefix: str, metadata) -> dict:
        """Return the sharded state of the modules' weights by the names of the weights in the chunk."""
        state = {}
        children = {name.partition(".")[0] for name in self._modules_by_name}
        for name in sorted(children):
            child = getattr(self._chunk[0], name)
            state |= sharded_state_dict_default(child, f"{prefix}{name}.", (), metadata)
        state = {name.removeprefix(prefix): x for name, x in state.items()}
        if "output_layer" in children:
            state["output_layer.weight"].allow_shape_mismatch = True  # padded vocabulary, as Megatron has it
        return state


def _buffer(name: str, what: str) -> str:
    return f"{name}.{what}".replace(".", "/")  # a buffer's name has no dots


def _sharded_amax(
    weight: ShardedTensor | ShardedTensorFactory, amax: Tensor, carried: CarriedModule
) -> ShardedTensor | ShardedTensorFactory:
    """Return the sharded amax, [1] for each weight, equal on the ranks of the tensor-parallel group."""
    key = stored_name(weight.key, AMAX)
    replica_id = (0, carried.tp_rank, weight.replica_id[-1])
    if carried.module.weight.dim() == 2:
        return ShardedTensor.from_rank_offsets(key, amax, replica_id=replica_id)
    first = carried.module.first_expert

    def build(key, tensor, replica_id, _):
        names = (key.replace("*", str(first + i)) for i in range(len(tensor)))
        return [
            ShardedTensor.from_rank_offsets(name, amax, replica_id=replica_id)
            for name, amax in zip(names, tensor.split(1), strict=True)
        ]

    return ShardedTensorFactory(key, amax, build, torch.cat, replica_id)


def _sharded_scales(
    weight: ShardedTensor | ShardedTensorFactory, scales: Tensor, block_size: int
) -> ShardedTensor | ShardedTensorFactory:
    """Return the sharded block scales, uint8 [..., out, in / block size].

    A weight that is stored in parts has functions that split and join tensors of its shape. They get every scale
    ``block_size`` times, and one of them is kept in each part.
    """
    key = stored_name(weight.key, BLOCK_SCALES)
    if isinstance(weight, ShardedTensor):
        return _with_block_columns(weight, scales, block_size, key)
    split, join, replica_id = weight.build_fn, weight.merge_fn, weight.replica_id

    def build(key, tensor, replica_id, flattened_range):
        parts = split(key, tensor.repeat_interleave(block_size, -1), replica_id, flattened_range)
        return dict_list_map_inplace(
            lambda part: _with_block_columns(part, part.data[..., ::block_size].contiguous(), block_size, part.key),
            parts,
        )

    def merge(parts):
        wide = dict_list_map_inplace(lambda part: part.repeat_interleave(block_size, -1), parts)
        return join(wide)[..., ::block_size].contiguous()

    return ShardedTensorFactory(key, scales, build, merge, replica_id)


def _with_block_columns(weight: ShardedTensor, scales: Tensor, block_size: int, key: str) -> ShardedTensor:
    """Return the sharding of a weight with one column for each block. A shard consists of complete blocks."""

    def blocks(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return (*sizes[:-1], sizes[-1] // block_size)

    return replace(
        weight,
        key=key,
        data=scales,
        dtype=scales.dtype,
        local_shape=tuple(scales.shape),
        global_shape=blocks(weight.global_shape),
        global_offset=blocks(weight.global_offset),
    )
