"""Linear of all local experts: one weight [experts, out, in] in memory, one tensor for each expert in checkpoints."""

from collections.abc import Callable, Sequence

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_qad.models.grouped_product import grouped_product
from megatron_qad.models.weight_loading import GATED_HALVES


class GroupedLinear(torch.nn.Module):
    """The same projection of every local expert, with a weight [local experts, out, in] and without a bias.

    Expert-parallel ranks hold different experts. Expert tensor parallelism shards the outputs or the inputs of each;
    the token dispatcher gathers the tokens before the experts and sums their outputs, so there is no communication
    here. The arguments are those of Megatron's grouped linears; arguments that are not listed are unused.

    Args:
        num_local_experts: number of experts on this rank.
        input_size: inputs of an expert over all ranks.
        output_size: outputs of an expert over all ranks; for a gated MLP, those of gate and up together.
        shards: what expert tensor parallelism splits, "outputs" or "inputs".
        pg_collection: Megatron's process groups ``ep``, ``expt_tp`` and ``expt_dp``.
    """

    def __init__(
        self,
        num_local_experts: int,
        input_size: int,
        output_size: int,
        *,
        shards: str,
        config,
        init_method: Callable[[Tensor], None],
        bias: bool,
        pg_collection,
        **_unused,
    ):
        super().__init__()
        assert not bias, "not supported: experts with biases"
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        self.is_gated = config.gated_linear_unit and shards == "outputs"
        self._shard_axis = 0 if shards == "outputs" else 1
        shape = [output_size, input_size]
        shape[self._shard_axis] //= self.tp_group.size()
        self.weight = torch.nn.Parameter(
            torch.empty(
                num_local_experts,
                *shape,
                dtype=config.params_dtype,
                device="cpu" if config.use_cpu_initialization else torch.cuda.current_device(),
            )
        )
        set_tensor_model_parallel_attributes(self.weight, True, self._shard_axis + 1, 2 if self.is_gated else 1)
        # As in Megatron's linears: whether the gradient is reduced over the data-parallel group of experts.
        has_expert_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        self.weight.allreduce = not has_expert_groups
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                for expert in self.weight.data:
                    init_method(expert)

    @property
    def first_expert(self) -> int:
        """Index of the first local expert over all expert-parallel ranks."""
        return self.ep_group.rank() * self.num_local_experts

    def forward(self, x: Tensor, tokens_per_expert: Sequence[int]) -> tuple[Tensor, None]:
        """Return ([tokens, out], no bias) for ``x`` [tokens, in], sorted by expert."""
        return grouped_product(x, self.weight, tokens_per_expert), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict:
        """Return the sharded state, in which every expert is a linear of its own under its global index.

        The caller adds "*" to the keys, in place of the index. Buffers, such as the input's amax, are equal for all
        experts. Every expert's copy is stored; loading takes the maximum, because checkpoints of older versions have an
        amax for each expert.
        """
        tensors = {f"{prefix}{name}": x for name, x in self.state_dict(prefix="", keep_vars=True).items()}
        num_experts = self.ep_group.size() * self.num_local_experts

        def build_buffer(key, tensor, replica_id, _):
            names = (key.replace("*", str(i)) for i in range(num_experts))
            return [ShardedTensor.from_rank_offsets(name, tensor.clone(), replica_id=replica_id) for name in names]

        state = {}
        for name, tensor in tensors.items():
            if name == f"{prefix}weight":
                build, merge = self._build_weight(sharded_offsets), self._merge_weight
                replica_id = (0, 0, self.dp_group.rank())
            else:
                build, merge = build_buffer, lambda copies: torch.stack(copies).amax(0)
                replica_id = make_sharded_tensor_for_checkpoint(tensor, name).replica_id
            state[name] = ShardedTensorFactory(name, tensor, build, merge, replica_id)
        return state

    def _build_weight(self, sharded_offsets) -> Callable:
        """Return the function that splits a tensor of the weight's shape (the optimizer has more of them) into those
        of a checkpoint: one per expert, or two, gate and up."""
        prepended = len(sharded_offsets)
        shard = (self._shard_axis + prepended, self.tp_group.rank(), self.tp_group.size())
        endings = GATED_HALVES if self.is_gated else ("",)

        def build(key, tensor, replica_id, _):
            return [
                ShardedTensor.from_rank_offsets(
                    key.replace("*", str(self.first_expert + i)) + ending,
                    part,
                    *sharded_offsets,
                    shard,
                    replica_id=replica_id,
                    prepend_axis_num=prepended,
                )
                for i, expert in enumerate(tensor.detach())
                for ending, part in zip(endings, expert.chunk(len(endings)), strict=True)
            ]

        return build

    def _merge_weight(self, parts: list[Tensor]) -> Tensor:
        """Return the local weight, from the parts in the order of ``_build_weight``."""
        size = 2 if self.is_gated else 1
        return torch.stack([torch.cat(parts[i : i + size]) for i in range(0, len(parts), size)])
