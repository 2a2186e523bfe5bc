"""What an HF checkpoint must hold, from its config.json alone: tensors with shapes, linears, fused groups.

One function a family; a new family is a function in ``_FAMILIES``. Written down independently of the name maps in
``models``, so that the validator does not repeat an exporter's mistake.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_qad.engine.errors import QADError


@dataclass
class Inventory:
    """Tensors and linears of a model, as transformers names them."""

    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)  # stored as they are: norms, embeddings, biases
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)  # module -> [N, K]; may be quantized
    fused: list[tuple[str, ...]] = field(
        default_factory=list
    )  # linears that a server merges and that share their scales
    always_excluded: list[str] = field(default_factory=list)  # linear to a server, never quantized
    float32: set[str] = field(default_factory=set)  # of ``tensors``, those that stay in float32
    carried: tuple[str, ...] = ()  # what names of tensors begin with that no inventory lists and that stay as they were
    required: tuple[str, ...] = ()  # those of ``carried`` that must be there
    attentions: list[tuple[str, str]] = field(default_factory=list)  # key and value projection of each attention layer
    tied_head: bool = False  # lm_head.weight is model.embed_tokens.weight and need not be stored
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head"

    def carries(self, name: str) -> bool:
        return name.startswith(self.carried)

    def excluded(self, quantized) -> set[str]:
        """What the configurations must exclude where these linears are quantized."""
        return (set(self.linears) | set(self.always_excluded)) - set(quantized)


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


def _qwen3_moe(config: dict[str, Any]) -> Inventory:
    """Qwen3 with experts in the place of most MLPs."""
    model = _qwen3(config)
    hidden, width = _number(config, "hidden_size"), _number(config, "moe_intermediate_size")
    num_experts = _number(config, "num_experts", config.get("num_local_experts"))  # transformers 5 saves the second
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    for index in range(_number(config, "num_hidden_layers")):
        if index in dense or (index + 1) % step:
            continue
        mlp = f"model.layers.{index}.mlp"
        gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        for module in (*gate_up, f"{mlp}.down_proj"):
            del model.linears[module]
        model.fused.remove(gate_up)
        model.tensors[f"{mlp}.gate.weight"] = (num_experts, hidden)
        model.always_excluded.append(f"{mlp}.gate")  # servers build this router of a linear, Nemotron-H's of its own
        for number in range(num_experts):
            expert = f"{mlp}.experts.{number}"
            model.linears[f"{expert}.gate_proj"] = model.linears[f"{expert}.up_proj"] = (width, hidden)
            model.linears[f"{expert}.down_proj"] = (hidden, width)
            model.fused.append((f"{expert}.gate_proj", f"{expert}.up_proj"))
    return model


def _nemotron_nas(config: dict[str, Any]) -> Inventory:
    """Llama blocks after an architecture search: attention or MLP missing, one square linear, or of its own width."""
    hidden, heads, blocks = _number(config, "hidden_size"), _number(config, "num_attention_heads"), []
    if isinstance(config.get("block_configs"), list):
        blocks = [block for block in config["block_configs"] if _is_block(block)]
    if len(blocks) != _number(config, "num_hidden_layers"):
        raise QADError(f"config.json: block_configs describes {len(blocks)} blocks, expected num_hidden_layers")
    # Every block as if it were whole, then those parts replaced that are not.
    model = _llama(config | {"num_key_value_heads": heads, "intermediate_size": 1})
    for index, block in enumerate(blocks):
        layer = f"model.layers.{index}"
        for part, norm, module, square in (
            ("attention", "input_layernorm", "self_attn", "linear_attn"),
            ("ffn", "post_attention_layernorm", "mlp", "linear_mlp"),
        ):
            entry, prefix = block.get(part) or {}, f"{layer}.{module}."
            is_plain = not entry.get("no_op") and not entry.get("replace_with_linear")
            if is_plain and part == "attention":
                rows = heads // _number(entry, "n_heads_in_group") * _number(config, "head_dim", hidden // heads)
                model.linears |= {f"{prefix}k_proj": (rows, hidden), f"{prefix}v_proj": (rows, hidden)}
            elif is_plain:
                width = _nas_width(entry, hidden)
                model.linears |= {f"{prefix}{name}_proj": (width, hidden) for name in ("gate", "up")}
                model.linears[f"{prefix}down_proj"] = (hidden, width)
            else:
                for name in [name for name in model.linears if name.startswith(prefix)]:
                    del model.linears[name]
                model.fused = [group for group in model.fused if not group[0].startswith(prefix)]
                model.attentions = [pair for pair in model.attentions if not pair[0].startswith(prefix)]
                if entry.get("no_op"):
                    del model.tensors[f"{layer}.{norm}.weight"]
                else:
                    model.linears[f"{prefix}{square}"] = (hidden, hidden)
    return model


def _is_block(block: Any) -> bool:
    return isinstance(block, dict) and all(isinstance(block.get(part) or {}, dict) for part in ("attention", "ffn"))


def _nas_width(ffn: dict, hidden: int) -> int:
    if ffn.get("intermediate_size") is not None:
        return _number(ffn, "intermediate_size")
    factor = ffn.get("ffn_mult")
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise QADError(f"config.json: an entry of block_configs has ffn_mult {factor!r}, expected a positive number.")
    return (int(2 * factor * hidden / 3) + 255) // 256 * 256


def _nemotron_h(config: dict[str, Any], prefix: str = "") -> Inventory:
    """One mixer a layer, by the pattern: Mamba-2, attention, MLP or experts. The hub's names, after ``prefix``."""
    hidden, vocab = _number(config, "hidden_size"), _number(config, "vocab_size")
    model = Inventory(
        tied_head=bool(config.get("tie_word_embeddings", False)),
        embedding=f"{prefix}backbone.embeddings.weight",
        head=f"{prefix}lm_head",
        carried=(f"{prefix}mtp.",) if config.get("num_nextn_predict_layers") else (),
    )
    model.tensors |= {model.embedding: (vocab, hidden), f"{prefix}backbone.norm_f.weight": (hidden,)}
    model.linears[model.head] = (vocab, hidden)
    for index, add_mixer in enumerate(_mixers(config)):
        layer = f"{prefix}backbone.layers.{index}"
        model.tensors[f"{layer}.norm.weight"] = (hidden,)
        add_mixer(model, config, f"{layer}.mixer", hidden)
    return model


def _nemotron_vl(config: dict[str, Any]) -> Inventory:
    """A Nemotron-H behind a vision encoder, which is whatever it was."""
    inner = config.get("llm_config") or config.get("text_config")
    if not isinstance(inner, dict):
        raise QADError(f"config.json: llm_config is {inner!r:.100}, expected the language model's config.")
    model = _nemotron_h(inner, "language_model.")
    model.required = ("vision_model.", "mlp1.")
    model.carried += model.required
    return model


def _mixers(config: dict) -> list[Callable]:
    """What each layer is: a letter of ``hybrid_override_pattern``, a name in ``layers_block_type`` of newer files."""
    key, add = "hybrid_override_pattern", {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}
    if config.get(key) is None and config.get("layers_block_type") is not None:
        key, add = "layers_block_type", {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _experts}
        add |= {"linear_attention": _mamba, "full_attention": _attention}
    layers, known = config.get(key), tuple(add)  # a tuple, as above
    if not isinstance(layers, str if "M" in known else list) or any(layer not in known for layer in layers):
        raise QADError(f"config.json: {key} is {layers!r}, expected one of {', '.join(add)} for each layer.")
    return [add[layer] for layer in layers]


def _mamba(model: Inventory, config: dict, mixer: str, hidden: int) -> None:
    heads, state = _number(config, "mamba_num_heads"), _number(config, "n_groups") * _number(config, "ssm_state_size")
    inner = heads * _number(config, "mamba_head_dim")
    model.linears[f"{mixer}.in_proj"] = (2 * inner + 2 * state + heads, hidden)
    model.linears[f"{mixer}.out_proj"] = (hidden, inner)
    model.always_excluded.append(f"{mixer}.conv1d")
    channels = inner + 2 * state
    model.tensors |= {f"{mixer}.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}
    model.tensors |= {f"{mixer}.norm.weight": (inner,), f"{mixer}.conv1d.bias": (channels,)}
    model.tensors[f"{mixer}.conv1d.weight"] = (channels, 1, _number(config, "conv_kernel", 4))


def _attention(model: Inventory, config: dict, mixer: str, hidden: int) -> None:
    heads = _number(config, "num_attention_heads")
    kv_heads = _number(config, "num_key_value_heads", heads)
    head_dim = _number(config, "head_dim", _number(config, "attention_head_dim", hidden // heads))
    qkv = tuple(f"{mixer}.{x}_proj" for x in "qkv")
    model.linears |= {name: (n * head_dim, hidden) for name, n in zip(qkv, (heads, kv_heads, kv_heads), strict=True)}
    model.linears[f"{mixer}.o_proj"] = (hidden, heads * head_dim)
    model.fused.append(qkv)
    model.attentions.append(qkv[1:])


def _mlp(model: Inventory, config: dict, mixer: str, hidden: int, width: int | None = None) -> None:
    width = width or _number(config, "intermediate_size")
    model.linears |= {f"{mixer}.up_proj": (width, hidden), f"{mixer}.down_proj": (hidden, width)}


def _experts(model: Inventory, config: dict, mixer: str, hidden: int) -> None:
    number, width = _number(config, "n_routed_experts"), _number(config, "moe_intermediate_size")
    latent = config.get("moe_latent_size")
    bias = f"{mixer}.gate.e_score_correction_bias"
    model.tensors |= {f"{mixer}.gate.weight": (number, hidden), bias: (number,)}
    model.float32.add(bias)
    if latent:
        model.linears |= {f"{mixer}.fc1_latent_proj": (latent, hidden), f"{mixer}.fc2_latent_proj": (hidden, latent)}
    for index in range(number):
        _mlp(model, config, f"{mixer}.experts.{index}", latent or hidden, width)
    if config.get("n_shared_experts", 1):
        _mlp(model, config, f"{mixer}.shared_experts", hidden, _number(config, "moe_shared_expert_intermediate_size"))


_FAMILIES: dict[str, Callable[[dict[str, Any]], Inventory]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "nemotron_h": _nemotron_h,
    "nemotron-nas": _nemotron_nas,
    "NemotronH_Nano_VL_V2": _nemotron_vl,
}


def _number(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise QADError(f"config.json: {key} is {value!r}, expected a positive integer.")
    return value
