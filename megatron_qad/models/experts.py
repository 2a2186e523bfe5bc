"""Mixtures of experts, for both layer specs: a router that may be frozen, experts that are stored one by one.

Frozen is the rule in QAD: the student is to send each token where the teacher sends it. That takes two things, since
the router's bias (``expert_bias``) moves without a gradient, by counting tokens. Left out: grouped GEMMs; each expert
is an MLP of its own, whose input has an amax of its own.
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
    """Megatron's top-k router; ``is_frozen``: neither its weight nor its bias moves."""

    def __init__(self, *args, is_frozen: bool, **kwargs):
        super().__init__(*args, **kwargs)
        if is_frozen:
            self.weight.requires_grad_(False)
            self.frozen_expert_bias = True

    def _apply(self, fn, recurse=True):
        # A model that is made BF16 takes its buffers along; the bias would come back to float32 (upstream sees to that
        # before each pass) rounded.
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self


class Experts(SequentialMLP):
    """The experts of this rank, one MLP each, every one stored under its global index whatever the layout."""

    def forward(self, *args, **kwargs):
        # modelopt knows a class by its forward pass. It would put its own in SequentialMLP's place, which refuses
        # tensor and expert parallelism together; the experts' linears are all that is to be replaced.
        return super().forward(*args, **kwargs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return super().sharded_state_dict(prefix, sharded_offsets, {**(metadata or {}), "singleton_local_shards": True})


class LocalMoELayer(moe_layer.MoELayer):
    """``MoELayer`` without Transformer Engine: the projections into and out of the narrower space that experts may work
    in (``moe_latent_size``) are torch's."""

    def __init__(self, *args, **kwargs):
        # Upstream's constructor takes them from these names of its module, and nowhere else.
        with patch.multiple(moe_layer, HAVE_TE=True, TELinear=DuplicatedLinear):
            super().__init__(*args, **kwargs)


def moe_mlp(layer: type, column_parallel_linear: type, row_parallel_linear: type, *, trains_router: bool) -> partial:
    """What a layer of experts builds as its MLP: ``layer``, a ``MoELayer``, of these linears."""
    linears = MLPSubmodules(linear_fc1=column_parallel_linear, linear_fc2=row_parallel_linear)
    return partial(
        layer,
        submodules=moe_layer.MoESubmodules(
            router=partial(Router, is_frozen=not trains_router),
            experts=partial(Experts, submodules=linears),
            shared_experts=partial(SharedExpertMLP, submodules=linears),
        ),
    )
