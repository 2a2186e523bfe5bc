"""Expected tensors of Nemotron-H: each layer is Mamba-2, attention, MLP or experts, as given by the pattern."""

from collections.abc import Callable
from typing import Any

from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory, is_set, num_experts, positive_integer
from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError


def expected_tensors(config: dict[str, Any], prefix: str = "") -> Inventory:
    """Return the inventory with the tensor names of the Hub, prepended with ``prefix``."""
    hidden, vocab = positive_integer(config, "hidden_size"), positive_integer(config, "vocab_size")
    model = Inventory(
        tied_head=is_set(config, "tie_word_embeddings"),
        embedding=f"{prefix}backbone.embeddings.weight",
        head=f"{prefix}lm_head",
        passthrough_prefixes=(f"{prefix}mtp.",) if config.get("num_nextn_predict_layers") else (),
    )
    model.tensors |= {model.embedding: (vocab, hidden), f"{prefix}backbone.norm_f.weight": (hidden,)}
    model.linears[model.head] = (vocab, hidden)
    for index, add_mixer in enumerate(_mixers(config)):
        layer = f"{prefix}backbone.layers.{index}"
        model.tensors[f"{layer}.norm.weight"] = (hidden,)
        add_mixer(model, config, f"{layer}.mixer", hidden)
    return model


def _mixers(config: dict) -> list[Callable]:
    """Return a function per layer, from ``hybrid_override_pattern`` or, in newer files, ``layers_block_type``."""
    key, add = "hybrid_override_pattern", {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}
    if config.get(key) is None and config.get("layers_block_type") is not None:
        key, add = "layers_block_type", {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _experts}
        add |= {"linear_attention": _mamba, "full_attention": _attention}
    layers, supported = config.get(key), tuple(add)  # a tuple, because a damaged file may hold an unhashable value
    if not isinstance(layers, str if "M" in supported else list) or any(layer not in supported for layer in layers):
        raise QADError(f"config.json: {key} is {layers!r:.100}, expected one of {', '.join(add)} for each layer.")
    if len(layers) > values.MAX_LAYERS:
        raise QADError(f"config.json: {key} has {len(layers)} layers, expected at most {values.MAX_LAYERS:,}.")
    mixers = [add[layer] for layer in layers]
    if _experts in mixers:
        num_experts(config, "n_routed_experts", mixers.count(_experts))  # raises before millions are listed
    return mixers


def _mamba(model: Inventory, config: dict, mixer: str, hidden: int) -> None:
    heads, state = (
        positive_integer(config, "mamba_num_heads"),
        positive_integer(config, "n_groups") * positive_integer(config, "ssm_state_size"),
    )
    inner = heads * positive_integer(config, "mamba_head_dim")
    model.linears[f"{mixer}.in_proj"] = (2 * inner + 2 * state + heads, hidden)
    model.linears[f"{mixer}.out_proj"] = (hidden, inner)
    model.never_quantized.append(f"{mixer}.conv1d")
    channels = inner + 2 * state
    model.tensors |= {f"{mixer}.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}
    model.tensors |= {f"{mixer}.norm.weight": (inner,), f"{mixer}.conv1d.bias": (channels,)}
    model.tensors[f"{mixer}.conv1d.weight"] = (channels, 1, positive_integer(config, "conv_kernel", 4))


def _attention(model: Inventory, config: dict, mixer: str, hidden: int) -> None:
    heads = positive_integer(config, "num_attention_heads")
    # 8 key-value heads of size 128 are the defaults of the config class. Old files have attention_head_dim.
    config = {"num_key_value_heads": 8, "head_dim": config.get("attention_head_dim", 128)} | config
    kv_heads = positive_integer(config, "num_key_value_heads", heads)
    head_dim = positive_integer(config, "head_dim", hidden // heads)
    qkv = tuple(f"{mixer}.{x}_proj" for x in "qkv")
    model.linears |= {name: (n * head_dim, hidden) for name, n in zip(qkv, (heads, kv_heads, kv_heads), strict=True)}
    model.linears[f"{mixer}.o_proj"] = (hidden, heads * head_dim)
    model.fused.append(qkv)
    model.attentions.append(qkv[1:])


def _mlp(model: Inventory, config: dict, mixer: str, hidden: int, width: int | None = None) -> None:
    width = width or positive_integer(config, "intermediate_size")
    model.linears |= {f"{mixer}.up_proj": (width, hidden), f"{mixer}.down_proj": (hidden, width)}


def _experts(model: Inventory, config: dict, mixer: str, hidden: int) -> None:
    count, width = num_experts(config, "n_routed_experts", 1), positive_integer(config, "moe_intermediate_size")
    latent = values.integer(config, "moe_latent_size", None)
    bias = f"{mixer}.gate.e_score_correction_bias"
    model.tensors |= {f"{mixer}.gate.weight": (count, hidden), bias: (count,)}
    model.float32.add(bias)
    if latent:
        model.linears |= {f"{mixer}.fc1_latent_proj": (latent, hidden), f"{mixer}.fc2_latent_proj": (hidden, latent)}
    for index in range(count):
        _mlp(model, config, f"{mixer}.experts.{index}", latent or hidden, width)
    model.experts.append(tuple(name for name in model.linears if name.startswith(f"{mixer}.experts.")))
    if values.integer(config, "n_shared_experts", 1, minimum=0):
        _mlp(
            model,
            config,
            f"{mixer}.shared_experts",
            hidden,
            positive_integer(config, "moe_shared_expert_intermediate_size"),
        )
