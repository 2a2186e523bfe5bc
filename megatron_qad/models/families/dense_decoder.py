"""Shared parts of dense decoder families: Llama's attention, gated MLP, rope, embedding and head.

Each Hugging Face block becomes two layers of the pattern, attention ``*`` and MLP ``-``: block i is layers 2i and 2i+1.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.attention_heads import heads
from megatron_qad.models.families.base import Family, GatedMLPMapping, ParamMapping, QKVMapping
from megatron_qad.models.families.rope_config import rope_scaling, rotary_base
from megatron_qad.models.families.unbuilt import check_built

__all__ = ["attention", "embedding", "family", "final", "gated_mlp", "heads", "layer_pattern", "megatron_args"]
__all__ += ["num_layers", "rope_scaling", "tensors"]

QWEN_DEFAULTS = MappingProxyType(
    {"num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False}
)
"""What transformers' config classes of Qwen2 and Qwen3 assume of keys that a config.json lacks, where Llama's class
assumes something else."""
# Qwen2 has these biases, and Qwen3 these norms, whether or not an entry says so. Qwen3-Coder's files have use_qk_norm.
_QKV_BIAS_KEYS = frozenset({"attention_bias"})
_QK_NORM_KEYS = frozenset({"use_qk_norm"})
CONFIG_KEYS = frozenset(
    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    + ("hidden_act", "rms_norm_eps", "vocab_size", "rope_parameters")
)


def num_layers(config: dict) -> int:
    """Return the number of Hugging Face blocks."""
    return values.integer(config, "num_hidden_layers", maximum=values.MAX_LAYERS)


def with_defaults(function: Callable, defaults: Mapping) -> Callable:
    """Return a function of a config that has ``defaults`` for the keys that the config lacks."""
    return lambda config: function(values.with_defaults(config, defaults))


def layer_pattern(config: dict) -> str:
    return "*-" * num_layers(config)


def megatron_args(config: dict, *, qkv_bias: bool, qk_norm: bool) -> dict:
    """Return the Megatron options. Raises QADError for entries that Megatron would ignore or compute differently."""
    _check_supported(
        config, built=(_QKV_BIAS_KEYS if qkv_bias else frozenset()) | (_QK_NORM_KEYS if qk_norm else frozenset())
    )
    num_heads, num_groups, head_dim = heads(config)
    if head_dim % 2:
        raise QADError(f"{values.place(config)}: head_dim {head_dim} is odd. Rotary embeddings need an even one.")
    return {
        "hybrid-layer-pattern": layer_pattern(config),
        "hidden-size": values.integer(config, "hidden_size"),
        "ffn-hidden-size": values.integer(config, "intermediate_size"),
        "num-attention-heads": num_heads,
        "group-query-attention": True,
        "num-query-groups": num_groups,
        "kv-channels": head_dim,
        "normalization": "RMSNorm",
        "norm-epsilon": values.number(config, "rms_norm_eps", 1e-6, above=0, maximum=1),
        "position-embedding-type": "rope",
        "rotary-base": rotary_base(config),
        "swiglu": True,
        "disable-bias-linear": True,
        "add-qkv-bias": qkv_bias,
        "qk-layernorm": qk_norm,
        "untie-embeddings-and-output-weights": not is_tied(config),
        "max-position-embeddings": values.integer(
            config, "max_position_embeddings", 2048, maximum=values.MAX_POSITIONS
        ),
        "vocab-size": values.integer(config, "vocab_size"),
    }


def is_tied(config: dict) -> bool:
    """Return whether the output head is the embedding's weight."""
    return values.flag(config, "tie_word_embeddings", False)


def _check_supported(config: dict, built: frozenset[str]) -> None:
    rope_scaling(config)  # raises on unsupported types
    if (act := values.text(config, "hidden_act", "silu")) != "silu":
        raise QADError(f"{values.place(config)}: hidden_act {act!r:.100} is not supported. Expected 'silu'.")
    layer_types = values.items(config, "layer_types", str, None)
    if layer_types is not None and len(layer_types) != num_layers(config):
        raise QADError(
            f"{values.place(config)}: layer_types has {len(layer_types)} entries, num_hidden_layers is "
            f"{num_layers(config)}."
        )
    check_built(config, built)


def tensors(config: dict, *, qkv_bias: bool, qk_norm: bool) -> list[ParamMapping]:
    mappings = [embedding(config)]
    for block in range(num_layers(config)):
        hf = f"model.layers.{block}"
        mappings += attention(config, 2 * block, hf, *heads(config), qkv_bias=qkv_bias, qk_norm=qk_norm)
        mappings += gated_mlp(config, 2 * block + 1, hf, values.integer(config, "intermediate_size"))
    return mappings + final(config)


def embedding(config: dict) -> ParamMapping:
    shape = (values.integer(config, "vocab_size"), values.integer(config, "hidden_size"))
    return ParamMapping("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "embedding", shape)


def attention(
    config: dict, layer: int, hf: str, heads: int, groups: int, head_dim: int, *, qkv_bias=False, qk_norm=False
) -> list[ParamMapping]:
    """Return the mappings of one attention layer and its norm.

    Args:
        layer: index in the layer pattern.
        hf: Hugging Face name of the block.
    """
    hidden = values.integer(config, "hidden_size")
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
    hidden = values.integer(config, "hidden_size")
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
    vocab, hidden = values.integer(config, "vocab_size"), values.integer(config, "hidden_size")
    mappings = [ParamMapping("decoder.final_norm.weight", ("model.norm.weight",), "norm", (hidden,))]
    if not is_tied(config):
        mappings.append(
            ParamMapping("output_layer.weight", ("lm_head.weight",), "head", (vocab, hidden), is_linear=True)
        )
    return mappings


def family(
    architecture: str,
    model_type: str,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    defaults: Mapping = MappingProxyType({}),
) -> Family:
    """Return a family of dense decoders, optionally with QKV biases or with norms of queries and keys.

    Args:
        defaults: values of keys that a config.json may lack, where they differ from Llama's.
    """
    return Family(
        architecture=architecture,
        model_type=model_type,
        layer_pattern=layer_pattern,
        megatron_args=with_defaults(partial(megatron_args, qkv_bias=qkv_bias, qk_norm=qk_norm), defaults),
        tensors=with_defaults(partial(tensors, qkv_bias=qkv_bias, qk_norm=qk_norm), defaults),
        rope_scaling=with_defaults(rope_scaling, defaults),
        config_keys=CONFIG_KEYS,
    )
