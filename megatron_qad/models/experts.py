"""Mixture-of-experts layers for both layer specs: a router that can be frozen, and experts that are stored separately.

The router is frozen by default in QAD, so that the student routes tokens as the teacher does. Freezing the weight is
not enough: the router's bias (``expert_bias``) is updated from token counts, without a gradient, so it is frozen too.
Not supported: grouped GEMMs. Each expert is a separate MLP, so that each expert input has its own amax.
"""

from functools import partial
from unittest.mock import patch

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

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


class Experts(SequentialMLP):
    """The experts of this rank as separate MLPs, each saved under its global index for any parallelism."""

    def forward(self, *args, **kwargs):
        # modelopt identifies classes by their forward method and would replace SequentialMLP by its own class, which
        # does not support tensor and expert parallelism together. Only the experts' linears should be replaced.
        return super().forward(*args, **kwargs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return super().sharded_state_dict(prefix, sharded_offsets, {**(metadata or {}), "singleton_local_shards": True})


class LocalMoELayer(moe_layer.MoELayer):
    """``MoELayer`` without Transformer Engine. The projections to and from the latent space of the experts
    (``moe_latent_size``) are torch linears."""

    def __init__(self, *args, **kwargs):
        # Megatron's constructor looks the projections up under these module-level names only.
        with patch.multiple(moe_layer, HAVE_TE=True, TELinear=DuplicatedLinear):
            super().__init__(*args, **kwargs)


def moe_mlp(layer: type, column_parallel_linear: type, row_parallel_linear: type, *, trains_router: bool) -> partial:
    """Return the constructor of the MLP of an expert layer: ``layer``, a ``MoELayer`` class, with these linears."""
    linears = MLPSubmodules(linear_fc1=column_parallel_linear, linear_fc2=row_parallel_linear)
    return partial(
        layer,
        submodules=moe_layer.MoESubmodules(
            router=partial(Router, is_frozen=not trains_router),
            experts=partial(Experts, submodules=linears),
            shared_experts=partial(SharedExpertMLP, submodules=linears),
        ),
    )
