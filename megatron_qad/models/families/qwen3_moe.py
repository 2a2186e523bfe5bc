"""Qwen3-MoE (``Qwen3MoeForCausalLM``): Qwen3's attention, and gated experts with a softmax router.

As in the dense families, block i is layers 2i and 2i + 1 of the pattern. The second one is ``E``, or ``-`` in blocks
that the config leaves dense. Hugging Face names are those on the hub, with separate experts and no shared experts.
"""

from collections.abc import Iterator

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import dense_decoder
from megatron_qad.models.families.base import ExpertGatedMLPMapping, Family, ParamMapping
from megatron_qad.models.families.router_options import experts_per_token, num_experts, router_args

_DEFAULTS = dense_decoder.QWEN_DEFAULTS | {"num_key_value_heads": 4}


def layer_pattern(config: dict) -> str:
    return "".join("*E" if has_experts else "*-" for has_experts in _has_experts(config))


def _num_experts(config: dict) -> int:
    """Return the number of experts. transformers 5 saves it under another name than the files on the hub."""
    key = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"
    return num_experts(config, key, sum(_has_experts(config)))


def _has_experts(config: dict) -> list[bool]:
    """Return for each block whether it has experts."""
    num_blocks = dense_decoder.num_layers(config)
    step = values.integer(config, "decoder_sparse_step", 1)
    dense = set(values.items(config, "mlp_only_layers", int, []))
    if outside := sorted(block for block in dense if not 0 <= block < num_blocks):
        raise QADError(
            f"{values.place(config)}: mlp_only_layers has {outside[0]}, expected blocks from 0 to {num_blocks - 1}."
        )
    return [block not in dense and (block + 1) % step == 0 for block in range(num_blocks)]


def megatron_args(config: dict) -> dict:
    shape = dense_decoder.megatron_args(config, qkv_bias=False, qk_norm=True)
    shape["hybrid-layer-pattern"] = layer_pattern(config)
    num_routed = _num_experts(config)
    return shape | router_args(
        num_experts=num_routed,
        top_k=experts_per_token(config, num_routed),
        width=values.integer(config, "moe_intermediate_size"),
        # Renormalized probabilities of the chosen experts equal a softmax over their logits alone.
        softmax_over_all=not values.flag(config, "norm_topk_prob", False),
    )


def tensors(config: dict) -> list[ParamMapping]:
    mappings = [dense_decoder.embedding(config)]
    for block, has_experts in enumerate(_has_experts(config)):
        hf = f"model.layers.{block}"
        mappings += dense_decoder.attention(config, 2 * block, hf, *dense_decoder.heads(config), qk_norm=True)
        if has_experts:
            mappings += _experts(config, 2 * block + 1, hf)
        else:
            mappings += dense_decoder.gated_mlp(config, 2 * block + 1, hf, values.integer(config, "intermediate_size"))
    return mappings + dense_decoder.final(config)


def _experts(config: dict, layer: int, hf: str) -> Iterator[ParamMapping]:
    hidden, num_routed = values.integer(config, "hidden_size"), _num_experts(config)
    width, module = values.integer(config, "moe_intermediate_size"), f"decoder.layers.{layer}.mlp"
    norm = (f"{hf}.post_attention_layernorm.weight",)
    yield ParamMapping(f"decoder.layers.{layer}.pre_mlp_layernorm.weight", norm, "norm", (hidden,), layer)
    # Servers load the router as a linear to which the checkpoint's quantization config applies.
    router = (f"{module}.router.weight", (f"{hf}.mlp.gate.weight",), "router", (num_routed, hidden), layer)
    yield ParamMapping(*router, never_quantized=True)
    for i in range(num_routed):
        expert, names = f"{module}.experts.experts.{i}", f"{hf}.mlp.experts.{i}"
        yield ExpertGatedMLPMapping(
            f"{expert}.linear_fc1.weight",
            (f"{names}.gate_proj.weight", f"{names}.up_proj.weight"),
            "expert",
            (2 * width, hidden),
            layer,
            is_linear=True,
            rows=(width, width),
        )
        down = (f"{names}.down_proj.weight",)
        yield ParamMapping(f"{expert}.linear_fc2.weight", down, "expert", (hidden, width), layer, is_linear=True)


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    layer_pattern=layer_pattern,
    megatron_args=dense_decoder.with_defaults(megatron_args, _DEFAULTS),
    tensors=dense_decoder.with_defaults(tensors, _DEFAULTS),
    rope_scaling=dense_decoder.with_defaults(dense_decoder.rope_scaling, _DEFAULTS),
    config_keys=dense_decoder.CONFIG_KEYS | {"num_experts", "num_experts_per_tok", "moe_intermediate_size"},
)
