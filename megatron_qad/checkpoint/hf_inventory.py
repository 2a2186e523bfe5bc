"""What an HF checkpoint must hold, from its config.json alone: tensors with shapes, linears, fused groups.

One function a family; a new family is a function in ``_FAMILIES``. Written down independently of the name maps in
``models``, so that the validator does not repeat an exporter's mistake.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_qad.runtime.errors import QADError


@dataclass
class Inventory:
    """Tensors and linears of a model, as transformers names them."""

    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)  # stored as they are: norms, embeddings, biases
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)  # module -> [N, K]; may be quantized
    fused: list[tuple[str, ...]] = field(
        default_factory=list
    )  # linears that a server merges and that share their scales
    attentions: list[tuple[str, str]] = field(default_factory=list)  # key and value projection of each attention layer
    tied_head: bool = False  # lm_head.weight is model.embed_tokens.weight and need not be stored
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head"


def inventory(config: dict[str, Any]) -> Inventory:
    """The inventory of the model that ``config`` (config.json) describes.

    Raises QADError for an unsupported family, listing those supported, and for a missing or senseless entry.
    """
    model_type = config.get("model_type")
    if model_type not in tuple(_FAMILIES):  # a tuple, because a damaged file may hold an unhashable value
        raise QADError(
            f"config.json: model_type is {model_type!r}; the inventory is known for {', '.join(sorted(_FAMILIES))}. "
            "A new family is one function in megatron_qad/checkpoint/hf_inventory.py."
        )
    return _FAMILIES[model_type](config)


def _decoder(
    config: dict[str, Any], *, qkv_bias: bool, o_bias: bool, mlp_bias: bool, qk_norm: bool, head_dim: int | None = None
) -> Inventory:
    """The common shape of Llama and its kin: pre-norm, GQA, gated MLP."""
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    kv_heads = _number(config, "num_key_value_heads", heads)
    head_dim = _number(config, "head_dim", head_dim or hidden // heads)
    ffn, vocab = _number(config, "intermediate_size"), _number(config, "vocab_size")
    model = Inventory(tied_head=bool(config.get("tie_word_embeddings", False)))
    model.tensors[model.embedding] = (vocab, hidden)
    model.tensors["model.norm.weight"] = (hidden,)
    model.linears[model.head] = (vocab, hidden)

    def linear(name: str, rows: int, columns: int, bias: bool) -> str:
        model.linears[name] = (rows, columns)
        if bias:
            model.tensors[f"{name}.bias"] = (rows,)
        return name

    for index in range(_number(config, "num_hidden_layers")):
        layer = f"model.layers.{index}"
        model.tensors[f"{layer}.input_layernorm.weight"] = (hidden,)
        model.tensors[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        if qk_norm:
            model.tensors[f"{attention}.q_norm.weight"] = (head_dim,)
            model.tensors[f"{attention}.k_norm.weight"] = (head_dim,)
        qkv = (
            linear(f"{attention}.q_proj", heads * head_dim, hidden, qkv_bias),
            linear(f"{attention}.k_proj", kv_heads * head_dim, hidden, qkv_bias),
            linear(f"{attention}.v_proj", kv_heads * head_dim, hidden, qkv_bias),
        )
        linear(f"{attention}.o_proj", hidden, heads * head_dim, o_bias)
        gate_up = (
            linear(f"{mlp}.gate_proj", ffn, hidden, mlp_bias),
            linear(f"{mlp}.up_proj", ffn, hidden, mlp_bias),
        )
        linear(f"{mlp}.down_proj", hidden, ffn, mlp_bias)
        model.fused += [qkv, gate_up]
        model.attentions.append((qkv[1], qkv[2]))
    return model


def _llama(config: dict[str, Any]) -> Inventory:
    bias = bool(config.get("attention_bias", False))
    return _decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)), qk_norm=False)


def _qwen2(config: dict[str, Any]) -> Inventory:
    return _decoder(config, qkv_bias=True, o_bias=False, mlp_bias=False, qk_norm=False)


def _qwen3(config: dict[str, Any]) -> Inventory:
    bias = bool(config.get("attention_bias", False))
    return _decoder(
        config, qkv_bias=bias, o_bias=bias, mlp_bias=False, qk_norm=True, head_dim=128
    )  # 128: its config's default


_FAMILIES: dict[str, Callable[[dict[str, Any]], Inventory]] = {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3}


def _number(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise QADError(f"config.json: {key} is {value!r}, expected a positive integer.")
    return value
