"""Llama Nemotron Super and similar models (``DeciLMForCausalLM``): Llama blocks after neural architecture search (NAS).

``block_configs`` describes every block: attention or MLP may be missing (then the pattern lacks its symbol, and the
model its norm) or replaced by one linear, and each MLP has its own width. A model with replaced layers can only be
inspected, because ``HybridModel`` has no layer for them. Llama Nemotron Super V1 49B has no replaced layers.
"""

import math

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import dense_decoder
from megatron_qad.models.families.base import Family, ParamMapping

_FFN_MULTIPLE = 256
_SUPPORTED_KEYS = {"no_op", "replace_with_linear", "n_heads_in_group", "ffn_mult", "intermediate_size"}
_LLAMA_VALUES = {"hidden_act": "silu", "gated": True}


def ffn_size(config: dict, ffn: dict) -> int:
    """Return the inner width of a block's MLP: 2/3 ``ffn_mult`` times the hidden size, rounded up to 256."""
    if ffn.get("intermediate_size") is not None:
        return values.integer(ffn, "intermediate_size")
    if ffn.get("ffn_mult") is None:
        raise QADError(f"{values.place(ffn)}: block_configs has an MLP without 'ffn_mult': {dict(ffn)!r:.200}.")
    factor = values.number(ffn, "ffn_mult", above=0, maximum=1000)
    width = int(2 * factor * values.integer(config, "hidden_size") / 3)
    return -(-width // _FFN_MULTIPLE) * _FFN_MULTIPLE


def layer_pattern(config: dict) -> str:
    return "".join(symbol for _, symbol, _ in _layers(config))


def mlp_widths(config: dict) -> tuple[int, ...]:
    return tuple(ffn_size(config, part) if symbol == "-" else 0 for _, symbol, part in _layers(config))


def megatron_args(config: dict) -> dict:
    layers = _layers(config)
    if replaced_blocks := [block for block, _, part in layers if values.flag(part, "replace_with_linear", False)]:
        raise QADError(
            f"{values.place(config)}: block_configs[{replaced_blocks[0]}] has 'replace_with_linear'. Such blocks can "
            "be inspected (megatron-qad inspect), but not imported or trained."
        )
    for block, _, part in layers:
        for key, value in part.items():
            if key not in _SUPPORTED_KEYS and (value or key in _LLAMA_VALUES) and value != _LLAMA_VALUES.get(key):
                raise QADError(
                    f"{values.place(config)}: block_configs[{block}] has {key:.100} {value!r:.100}, which is not "
                    "supported. Expected the attention and MLP of Llama, or 'no_op'."
                )
    sizes = {part.get("n_heads_in_group") for _, symbol, part in layers if symbol == "*"}
    widths = [width for width in mlp_widths(config) if width]
    if len(sizes) != 1 or not all(sizes) or not widths:
        raise QADError(
            f"{values.place(config)}: block_configs has attention with n_heads_in_group {list(sizes)} and "
            f"{len(widths)} MLPs. Expected at least one MLP and one value, because all of Megatron's attention layers "
            "have the same shape."
        )
    unit, num_heads = math.gcd(*widths), values.integer(config, "num_attention_heads")
    uniform = {
        "num_key_value_heads": next(_num_groups(num_heads, part) for _, symbol, part in layers if symbol == "*"),
        # Layers take their widths from mlp_widths. Megatron uses this value to count FLOPs and to warm up its fused
        # gate, so it is near the mean and divisible by the same tensor-parallel sizes as the other widths.
        "intermediate_size": unit * round(sum(widths) / len(widths) / unit),
    }
    shape = dense_decoder.megatron_args(config | uniform, qkv_bias=False, qk_norm=False)
    return shape | {"hybrid-layer-pattern": layer_pattern(config)}


def tensors(config: dict) -> list[ParamMapping]:
    num_heads, _, head_dim = dense_decoder.heads(config | {"num_key_value_heads": None})
    mappings = [dense_decoder.embedding(config)]
    for layer, (block, symbol, part) in enumerate(_layers(config)):
        hf = f"model.layers.{block}"
        if values.flag(part, "replace_with_linear", False):
            mappings += _replaced_layer(config, layer, hf, symbol)
        elif symbol == "*":
            mappings += dense_decoder.attention(config, layer, hf, num_heads, _num_groups(num_heads, part), head_dim)
        else:
            mappings += dense_decoder.gated_mlp(config, layer, hf, ffn_size(config, part))
    return mappings + dense_decoder.final(config)


def _layers(config: dict) -> list[tuple[int, str, dict]]:
    """Return (block, symbol, entry) for every layer that exists."""
    blocks = values.entries(config, "block_configs")
    if len(blocks) != dense_decoder.num_layers(config):
        raise QADError(
            f"{values.place(config)}: block_configs has {len(blocks)} entries, num_hidden_layers is "
            f"{config['num_hidden_layers']}."
        )
    parts = []
    for i, block in enumerate(blocks):
        for symbol, key in (("*", "attention"), ("-", "ffn")):
            if block.get(key) is None:
                raise QADError(f"{values.place(block)} has no {key!r}. Mark a missing one with 'no_op'.")
            parts.append((i, symbol, values.section(block, key)))
    return [(block, symbol, part) for block, symbol, part in parts if not values.flag(part, "no_op", False)]


def _num_groups(num_heads: int, attention: values.Section) -> int:
    """Return the number of key-value heads of a block."""
    size = values.integer(attention, "n_heads_in_group")
    if num_heads % size:
        raise QADError(
            f"{values.place(attention)}: n_heads_in_group {size} does not divide num_attention_heads {num_heads}."
        )
    return num_heads // size


def _replaced_layer(config: dict, layer: int, hf: str, symbol: str) -> list[ParamMapping]:
    """Return the mappings of a square linear that replaces attention or MLP, named as in Megatron's NAS layers."""
    hidden = values.integer(config, "hidden_size")
    if symbol == "*":
        module, kind = "self_attention", "attention"
        norm, linear = f"{hf}.input_layernorm.weight", f"{hf}.self_attn.linear_attn.weight"
    else:
        module, kind = "mlp", "mlp"
        norm, linear = f"{hf}.post_attention_layernorm.weight", f"{hf}.mlp.linear_mlp.weight"
    name = f"decoder.layers.{layer}.{module}"
    return [
        ParamMapping(f"{name}.layer_norm_weight", (norm,), "norm", (hidden,), layer),
        ParamMapping(f"{name}.weight", (linear,), kind, (hidden, hidden), layer, is_linear=True),
    ]


FAMILY = Family(
    architecture="DeciLMForCausalLM",
    model_type="nemotron-nas",
    layer_pattern=layer_pattern,
    megatron_args=megatron_args,
    tensors=tensors,
    rope_scaling=dense_decoder.rope_scaling,
    mlp_widths=mlp_widths,
    config_keys=dense_decoder.CONFIG_KEYS - {"num_key_value_heads", "intermediate_size"} | {"block_configs"},
)
