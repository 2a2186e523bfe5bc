"""Qwen3-MoE (``Qwen3MoeForCausalLM``): Qwen3's attention, and gated experts with a softmax router.

As in the dense families, block i is layers 2i and 2i + 1 of the pattern. The second one is ``E``, or ``-`` in blocks
that the config leaves dense. Hugging Face names are those on the hub, with separate experts and no shared experts.
"""

from collections.abc import Iterator

from megatron_qad.models.families import dense_decoder
from megatron_qad.models.families.base import ExpertGatedMLPMapping, Family, ParamMapping, required
from megatron_qad.models.families.router_options import router_args


def layer_pattern(config: dict) -> str:
    return "".join("*E" if _has_experts(config, i) else "*-" for i in range(required(config, "num_hidden_layers")))


def _num_experts(config: dict) -> int:
    """Return the number of experts. transformers 5 saves it under another name than the files on the hub."""
    return required(config, "num_experts" if config.get("num_local_experts") is None else "num_local_experts")


def _has_experts(config: dict, block: int) -> bool:
    step = config.get("decoder_sparse_step") or 1
    return block not in (config.get("mlp_only_layers") or ()) and (block + 1) % step == 0


def megatron_args(config: dict) -> dict:
    shape = dense_decoder.megatron_args(config, qkv_bias=False, qk_norm=True)
    shape["hybrid-layer-pattern"] = layer_pattern(config)
    return shape | router_args(
        num_experts=_num_experts(config),
        top_k=required(config, "num_experts_per_tok"),
        width=required(config, "moe_intermediate_size"),
        # Renormalized probabilities of the chosen experts equal a softmax over their logits alone.
        softmax_over_all=not config.get("norm_topk_prob", False),
    )


def tensors(config: dict) -> list[ParamMapping]:
    mappings = [dense_decoder.embedding(config)]
    for block in range(required(config, "num_hidden_layers")):
        hf = f"model.layers.{block}"
        mappings += dense_decoder.attention(config, 2 * block, hf, *dense_decoder.heads(config), qk_norm=True)
        if _has_experts(config, block):
            mappings += _experts(config, 2 * block + 1, hf)
        else:
            mappings += dense_decoder.gated_mlp(config, 2 * block + 1, hf, required(config, "intermediate_size"))
    return mappings + dense_decoder.final(config)


def _experts(config: dict, layer: int, hf: str) -> Iterator[ParamMapping]:
    hidden, num_experts = required(config, "hidden_size"), _num_experts(config)
    width, module = required(config, "moe_intermediate_size"), f"decoder.layers.{layer}.mlp"
    norm = (f"{hf}.post_attention_layernorm.weight",)
    yield ParamMapping(f"decoder.layers.{layer}.pre_mlp_layernorm.weight", norm, "norm", (hidden,), layer)
    # Servers load the router as a linear to which the checkpoint's quantization config applies.
    router = (f"{module}.router.weight", (f"{hf}.mlp.gate.weight",), "router", (num_experts, hidden), layer)
    yield ParamMapping(*router, never_quantized=True)
    for i in range(num_experts):
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
    layer_pattern=layer_pattern,
    megatron_args=megatron_args,
    tensors=tensors,
    rope_scaling=dense_decoder.rope_scaling,
)
