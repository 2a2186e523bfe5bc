"""Layer specs for ``HybridModel``: "te" uses Transformer Engine's layers, "local" Megatron's torch layers.

Both write and read the same checkpoints: the local spec maps its separate norms to the names of TE's fused norms
(``linear_qkv.layer_norm_weight``).
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_qad.models.attention import CoreAttention
from megatron_qad.models.experts import LocalMoELayer, moe_mlp
from megatron_qad.models.local_layers import LocalHybridStack, RMSNorm
from megatron_qad.models.variable_width_mlp import VariableWidthMLPLayer

LAYER_SPECS = ("te", "local")

# Checkpoint names of the local spec's norms: those of TE's fused LayerNorm + linear.
_TE_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_TE_MAMBA_NORM_NAME = {"norm.": "mixer.in_proj.layer_norm_"}


def hybrid_stack_spec(
    layer_spec: str, *, qk_layernorm: bool, trains_router: bool = False, mlp_widths: Sequence[int] | None = None
) -> ModuleSpec:
    """Return the spec of a model's layer stack.

    Args:
        layer_spec: "te" or "local". ``engine.capabilities().layer_spec`` is the choice for this machine.
        qk_layernorm: normalize each head's query and key (Qwen3).
        trains_router: train the routers of expert layers.
        mlp_widths: inner MLP width of every layer of the full model. None means the config's width.
    """
    spec = (_te_spec if layer_spec == "te" else _local_spec)(qk_layernorm, trains_router)
    if mlp_widths is None:
        return spec
    mlp_layer = dataclasses.replace(
        spec.submodules.mlp_layer, module=VariableWidthMLPLayer, params={"widths": mlp_widths}
    )
    return _with_submodules(spec, mlp_layer=mlp_layer)


def _te_spec(qk_layernorm: bool, trains_router: bool) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as upstream

    layers = upstream.submodules
    # The routed experts are those of the local spec. TE's grouped linears have one parameter per expert, no torch
    # reference, and run only on a GPU.
    mlp = moe_mlp(MoELayer, TEColumnParallelLinear, TERowParallelLinear, trains_router=trains_router)
    layer_specs = {"moe_layer": _with_submodules(layers.moe_layer, mlp=mlp)}
    if qk_layernorm:  # Megatron's attention spec has no QK norm
        attention = layers.attention_layer.submodules.self_attention
        normed = _with_submodules(attention, q_layernorm=TENorm, k_layernorm=TENorm)
        layer_specs["attention_layer"] = _with_submodules(layers.attention_layer, self_attention=normed)
    return _with_submodules(upstream, **layer_specs)


def _with_submodules(spec: ModuleSpec, **submodules) -> ModuleSpec:
    return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **submodules))


def _local_spec(qk_layernorm: bool, trains_router: bool) -> ModuleSpec:
    head_norm = RMSNorm if qk_layernorm else None
    attention_layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_TE_NORM_NAMES,
        ),
    )
    mlp_layer = ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=RMSNorm,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_TE_NORM_NAMES,
        ),
    )
    mamba_layer = ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=RMSNorm,
            mixer=ModuleSpec(
                module=MambaMixer,
                submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
            ),
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_TE_MAMBA_NORM_NAME,
        ),
    )
    moe_layer = ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=RMSNorm,
            mlp=moe_mlp(LocalMoELayer, ColumnParallelLinear, RowParallelLinear, trains_router=trains_router),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=mamba_layer, attention_layer=attention_layer, mlp_layer=mlp_layer, moe_layer=moe_layer
        ),
    )
