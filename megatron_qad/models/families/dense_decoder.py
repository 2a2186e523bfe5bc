"""Shared parts of dense decoder families: Llama's attention, gated MLP, rope, embedding and head.

Each Hugging Face block becomes two layers of the pattern, attention ``*`` and MLP ``-``: block i is layers 2i and 2i+1.
"""

from functools import partial

from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.base import Family, GatedMLPMapping, ParamMapping, QKVMapping, required


def _head_dim(config: dict) -> int:
    return config.get("head_dim") or required(config, "hidden_size") // required(config, "num_attention_heads")


def _num_groups(config: dict) -> int:
    return config.get("num_key_value_heads") or required(config, "num_attention_heads")


def _rope(config: dict) -> dict:
    """Return theta and scaling, which transformers 5 saves as ``rope_parameters`` and older versions separately."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise QADError(
            f"config.json: separate rope parameters for {nested[0]!r}. Only one set for all layers is supported."
        )
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    return rope


def rope_scaling(config: dict) -> dict | None:
    """Return the llama3 scaling, or None for plain rope. Other types raise QADError."""
    rope = _rope(config)
    if (factor := rope.pop("partial_rotary_factor")) not in (None, 1.0):
        raise QADError(f"config.json: partial_rotary_factor {factor} is not supported. Expected 1.0.")
    if rope["rope_theta"] != int(rope["rope_theta"]):
        raise QADError(f"config.json: rope_theta {rope['rope_theta']} must be an integer for Megatron.")
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "llama3":
        return rope
    raise QADError(f"config.json: rope type {rope['rope_type']!r} is not supported. Expected default or llama3.")


def layer_pattern(config: dict) -> str:
    return "*-" * required(config, "num_hidden_layers")


def megatron_args(config: dict, *, qkv_bias: bool, qk_norm: bool) -> dict:
    rope_scaling(config)  # raises on unsupported types
    if config.get("hidden_act", "silu") != "silu":
        raise QADError(f"config.json: hidden_act {config['hidden_act']!r} is not supported. Expected 'silu'.")
    if config.get("attention_bias") and not qkv_bias or config.get("mlp_bias"):
        raise QADError("config.json: attention_bias and mlp_bias are not supported, except for the QKV bias of Qwen2.")
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise QADError("config.json: sliding-window attention is not supported.")
    tied = bool(config.get("tie_word_embeddings", False))
    return {
        "hybrid-layer-pattern": layer_pattern(config),
        "hidden-size": required(config, "hidden_size"),
        "ffn-hidden-size": required(config, "intermediate_size"),
        "num-attention-heads": required(config, "num_attention_heads"),
        "group-query-attention": True,
        "num-query-groups": _num_groups(config),
        "kv-channels": _head_dim(config),
        "normalization": "RMSNorm",
        "norm-epsilon": config.get("rms_norm_eps", 1e-6),
        "position-embedding-type": "rope",
        "rotary-base": int(_rope(config)["rope_theta"]),
        "swiglu": True,
        "disable-bias-linear": True,
        "add-qkv-bias": qkv_bias,
        "qk-layernorm": qk_norm,
        "untie-embeddings-and-output-weights": not tied,
        "max-position-embeddings": config.get("max_position_embeddings", 2048),
        "vocab-size": required(config, "vocab_size"),
    }


def tensors(config: dict, *, qkv_bias: bool, qk_norm: bool) -> list[ParamMapping]:
    mappings = [embedding(config)]
    for block in range(required(config, "num_hidden_layers")):
        hf = f"model.layers.{block}"
        mappings += attention(config, 2 * block, hf, *heads(config), qkv_bias=qkv_bias, qk_norm=qk_norm)
        mappings += gated_mlp(config, 2 * block + 1, hf, required(config, "intermediate_size"))
    return mappings + final(config)


def heads(config: dict) -> tuple[int, int, int]:
    """Return the number of attention heads, the number of key-value heads, and the head dimension."""
    return required(config, "num_attention_heads"), _num_groups(config), _head_dim(config)


def embedding(config: dict) -> ParamMapping:
    shape = (required(config, "vocab_size"), required(config, "hidden_size"))
    return ParamMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "embedding", shape)


def attention(
    config: dict, layer: int, hf: str, heads: int, groups: int, head_dim: int, *, qkv_bias=False, qk_norm=False
) -> list[ParamMapping]:
    """Return the mappings of one attention layer and its norm.

    Args:
        layer: index in the layer pattern.
        hf: Hugging Face name of the block.
    """
    hidden = required(config, "hidden_size")
    module, rows = f"decoder.layers.{layer}.self_attention", (heads + 2 * groups) * head_dim
    qkv = partial(QKVMapping, kind="attention", layer=layer, num_heads=heads, num_groups=groups, head_dim=head_dim)
    names = [f"{hf}.self_attn.{x}_proj" for x in "qkv"]
    norm_name = f"{module}.linear_qkv.layer_norm_weight"
    mappings = [
        ParamMapping(norm_name, (f"{hf}.input_layernorm.weight",), "norm", (hidden,), layer),
        qkv(f"{module}.linear_qkv.weight", tuple(f"{n}.weight" for n in names), shape=(rows, hidden), is_linear=True),
    ]
    if qkv_bias:
        mappings.append(qkv(f"{module}.linear_qkv.bias", tuple(f"{n}.bias" for n in names), shape=(rows,)))
    if qk_norm:
        mappings += [
            ParamMapping(
                f"{module}.{x}_layernorm.weight", (f"{hf}.self_attn.{x}_norm.weight",), "norm", (head_dim,), layer
            )
            for x in "qk"
        ]
    output = (f"{hf}.self_attn.o_proj.weight",)
    shape = (hidden, heads * head_dim)
    return [*mappings, ParamMapping(f"{module}.linear_proj.weight", output, "attention", shape, layer, is_linear=True)]


def gated_mlp(config: dict, layer: int, hf: str, ffn: int) -> list[ParamMapping]:
    """Return the mappings of one gated MLP layer of inner width ``ffn`` and its norm."""
    hidden = required(config, "hidden_size")
    module = f"decoder.layers.{layer}.mlp"
    norm_name = f"{module}.linear_fc1.layer_norm_weight"
    gate_up = (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight")
    down = (f"{hf}.mlp.down_proj.weight",)
    return [
        ParamMapping(norm_name, (f"{hf}.post_attention_layernorm.weight",), "norm", (hidden,), layer),
        GatedMLPMapping(
            f"{module}.linear_fc1.weight",
            gate_up,
            "mlp",
            (2 * ffn, hidden),
            layer,
            is_linear=True,
            rows=(ffn, ffn),
        ),
        ParamMapping(f"{module}.linear_fc2.weight", down, "mlp", (hidden, ffn), layer, is_linear=True),
    ]


def final(config: dict) -> list[ParamMapping]:
    """Return the mappings of the final norm and, unless it is tied, the output head."""
    vocab, hidden = required(config, "vocab_size"), required(config, "hidden_size")
    mappings = [ParamMapping("decoder.final_norm.weight", ("model.norm.weight",), "norm", (hidden,))]
    if not config.get("tie_word_embeddings", False):
        mappings.append(
            ParamMapping("output_layer.weight", ("lm_head.weight",), "head", (vocab, hidden), is_linear=True)
        )
    return mappings


def family(architecture: str, *, qkv_bias: bool = False, qk_norm: bool = False) -> Family:
    """Return a family of dense decoders, optionally with QKV biases or with norms of queries and keys."""
    return Family(
        architecture=architecture,
        layer_pattern=layer_pattern,
        megatron_args=partial(megatron_args, qkv_bias=qkv_bias, qk_norm=qk_norm),
        tensors=partial(tensors, qkv_bias=qkv_bias, qk_norm=qk_norm),
        rope_scaling=rope_scaling,
    )
