"""Layer specs for ``HybridModel``: Transformer Engine's where it is installed, Megatron's torch layers where not.

Both write and read the same checkpoints: the local spec maps its separate norms to the names of TE's fused ones
(``linear_qkv.layer_norm_weight``). Left to later rooms: the Mamba and MoE layers of the local spec.
"""

import dataclasses
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_qad.models.attention import CoreAttention
from megatron_qad.models.local_layers import LocalHybridStack, RMSNorm

LAYER_SPECS = ("te", "local")

# Where the local spec's norms stand in a checkpoint: under the names of TE's fused LayerNorm + linear.
_NORMS_AS_TE_NAMES_THEM = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def hybrid_stack_spec(layer_spec: str, *, qk_layernorm: bool) -> ModuleSpec:
    """The stack of one model.

    Args:
        layer_spec: "te" or "local" (``runtime.capabilities().layer_spec`` says which fits this machine).
        qk_layernorm: whether attention normalizes each head's query and key (Qwen3).
    """
    if layer_spec == "te":
        return _te_spec(qk_layernorm)
    return _local_spec(qk_layernorm)


def _te_spec(qk_layernorm: bool) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as upstream

    if not qk_layernorm:
        return upstream
    # Upstream's attention has no QK norm: the same layer with the two norms filled in.
    attention = upstream.submodules.attention_layer
    self_attention = attention.submodules.self_attention
    normed = dataclasses.replace(self_attention.submodules, q_layernorm=TENorm, k_layernorm=TENorm)
    layer = dataclasses.replace(
        attention.submodules, self_attention=dataclasses.replace(self_attention, submodules=normed)
    )
    stack = dataclasses.replace(upstream.submodules, attention_layer=dataclasses.replace(attention, submodules=layer))
    return dataclasses.replace(upstream, submodules=stack)


def _local_spec(qk_layernorm: bool) -> ModuleSpec:
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
            sharded_state_dict_keys_map=_NORMS_AS_TE_NAMES_THEM,
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
            sharded_state_dict_keys_map=_NORMS_AS_TE_NAMES_THEM,
        ),
    )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(attention_layer=attention_layer, mlp_layer=mlp_layer),
    )
