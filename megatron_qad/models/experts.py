"""Mixture-of-experts layers for both layer specs: a router that can be frozen, and experts that share grouped GEMMs.

The router is frozen by default in QAD, so that the student routes tokens as the teacher does. Freezing the weight is
not enough: the router's bias (``expert_bias``) is updated from token counts, without a gradient, so it is frozen too.
"""

from functools import partial
from unittest.mock import patch

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from megatron_qad.models.grouped_linear import GroupedLinear
from megatron_qad.models.local_layers import DuplicatedLinear


class Router(TopKRouter):
    """Megatron's top-k router. With ``is_frozen``, neither its weight nor its bias is updated."""

    def __init__(self, *args, is_frozen: bool, **kwargs):
        super().__init__(*args, **kwargs)
        if is_frozen:
            self.weight.requires_grad_(False)
            self.frozen_expert_bias = True

    def _apply(self, fn, recurse=True):
        # Converting a model to BF16 also converts its buffers. Megatron converts the bias back to float32 before each
        # pass, but by then it would be rounded.
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self


class Experts(TEGroupedMLP):
    """The experts of this rank, with one weight per projection, each saved under its global index.

    Only the order of operations is that of Megatron's class, which needs no Transformer Engine for it. Its grouped
    linears do, and have one parameter per expert; ``GroupedLinear`` replaces them in both layer specs.
    """

    def forward(self, *args, **kwargs):
        # modelopt identifies classes by their forward method and would replace Megatron's class by one for the linears
        # of Transformer Engine. Only our linears should be replaced.
        return super().forward(*args, **kwargs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = {}
        for name, linear in self.named_children():
            shards = linear.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
            replace_prefix_for_sharding(shards, f"{prefix}{name}.", f"{prefix}experts.*.{name}.")
            state |= shards
        return state


class LocalMoELayer(moe_layer.MoELayer):
    """``MoELayer`` without Transformer Engine. The projections to and from the latent space of the experts
    (``moe_latent_size``) are torch linears."""

    def __init__(self, *args, **kwargs):
        # Megatron's constructor looks the projections up under these module-level names only.
        with patch.multiple(moe_layer, HAVE_TE=True, TELinear=DuplicatedLinear):
            super().__init__(*args, **kwargs)


def moe_mlp(layer: type, column_parallel_linear: type, row_parallel_linear: type, *, trains_router: bool) -> partial:
    """Return the constructor of the MLP of an expert layer: ``layer``, a ``MoELayer`` class.

    The linears are those of the shared experts. The routed experts are the same in both specs.
    """
    linears = MLPSubmodules(linear_fc1=column_parallel_linear, linear_fc2=row_parallel_linear)
    grouped = GroupedMLPSubmodules(
        linear_fc1=partial(GroupedLinear, shards="outputs"), linear_fc2=partial(GroupedLinear, shards="inputs")
    )
    return partial(
        layer,
        submodules=moe_layer.MoESubmodules(
            router=partial(Router, is_frozen=not trains_router),
            experts=partial(Experts, submodules=grouped),
            shared_experts=partial(SharedExpertMLP, submodules=linears),
        ),
    )
