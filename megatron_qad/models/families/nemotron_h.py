"""Nemotron-H and similar models (``NemotronHForCausalLM``): Mamba-2, attention, MLP and experts, one mixer per layer.

Layer i of the checkpoint is layer i of the pattern. Hugging Face names are those on the hub (``backbone.*``, separate
experts), which transformers 5 renames when loading. Megatron names of experts include the global index of the expert.
Not supported: biases of linears. Multi-token prediction layers (``mtp.*``) are passed through without training or
quantization.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.base import Family, ParamMapping, QKVMapping, required
from megatron_qad.models.families.router_options import router_args

_SYMBOLS = {
    "mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E",
}  # fmt: skip
_BIASES = ("attention_bias", "mlp_bias", "mamba_proj_bias", "use_bias")
# Values that are fixed in Megatron's Mamba mixer.
_MAMBA_VALUES = {"conv_kernel": 4, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "mamba_hidden_act": "silu"}
# Infinity as JSON's bare Infinity, and as transformers 5 writes it.
_NO_TIME_STEP_LIMIT = (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}])


@dataclass(frozen=True)
class MambaMapping(ParamMapping):
    """Mapping of a tensor whose rows are components that tensor parallelism shards separately.

    A torch_dist checkpoint stores each component as a separate tensor, ``{megatron}.{part}``.
    """

    parts: tuple[str, ...] = ()
    """Names of the components."""
    rows: tuple[int, ...] = ()
    """Rows of each component."""

    @property
    def checkpoint_splits(self):
        return {f".{part}": rows for part, rows in zip(self.parts, self.rows, strict=True)}


def layer_pattern(config: dict) -> str:
    """Return ``hybrid_override_pattern``, or the pattern from ``layers_block_type``, which newer files have instead."""
    pattern, blocks = config.get("hybrid_override_pattern"), config.get("layers_block_type")
    if pattern is None:
        if blocks is None:
            required(config, "hybrid_override_pattern")
        if unknown := [block for block in blocks if block not in _SYMBOLS]:
            raise QADError(f"config.json: layers_block_type has {unknown[0]!r}, expected {', '.join(_SYMBOLS)}.")
        pattern = "".join(_SYMBOLS[block] for block in blocks)
    if unknown := set(pattern) - set("M*-E"):
        raise QADError(f"config.json: hybrid_override_pattern has {sorted(unknown)[0]!r}, expected M, *, - or E.")
    if config.get("num_hidden_layers") not in (None, len(pattern)):
        raise QADError(
            f"config.json: num_hidden_layers is {config['num_hidden_layers']}, the layer pattern has {len(pattern)}."
        )
    return pattern


def megatron_args(config: dict) -> dict:
    pattern, num_heads = layer_pattern(config), required(config, "num_attention_heads")
    if config.get("mlp_hidden_act", "relu2") != "relu2":
        raise QADError(f"config.json: mlp_hidden_act {config['mlp_hidden_act']!r} is not supported. Expected 'relu2'.")
    if config.get("sliding_window"):
        raise QADError("config.json: sliding-window attention is not supported.")
    shape = {
        "hybrid-layer-pattern": pattern,
        "hidden-size": required(config, "hidden_size"),
        "ffn-hidden-size": config.get("intermediate_size") or required(config, "moe_intermediate_size"),
        "num-attention-heads": num_heads,
        "group-query-attention": True,
        "num-query-groups": config.get("num_key_value_heads") or num_heads,
        "kv-channels": _head_dim(config),
        "normalization": "RMSNorm",
        "norm-epsilon": config.get("layer_norm_epsilon", 1e-5),
        "position-embedding-type": "none",
        "squared-relu": True,
        "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": not config.get("tie_word_embeddings", False),
        "max-position-embeddings": config.get("max_position_embeddings", 4096),
        "vocab-size": required(config, "vocab_size"),
    }
    if "M" in pattern:
        shape |= _mamba_args(config)
    if "E" in pattern:
        shape |= _expert_args(config)
    return shape


def _mamba_args(config: dict) -> dict:
    for key, value in _MAMBA_VALUES.items():
        if config.get(key, value) != value:
            raise QADError(
                f"config.json: {key} {config[key]!r} is not supported. Megatron's Mamba layers have {value!r}."
            )
    if (limit := config.get("time_step_limit")) not in _NO_TIME_STEP_LIMIT:
        raise QADError(
            f"config.json: time_step_limit {limit!r} is not supported. Megatron's Mamba layers have no limits."
        )
    return {
        "mamba-num-heads": required(config, "mamba_num_heads"),
        "mamba-head-dim": required(config, "mamba_head_dim"),
        "mamba-num-groups": required(config, "n_groups"),
        "mamba-state-dim": required(config, "ssm_state_size"),
    }


def _expert_args(config: dict) -> dict:
    top_k, num_groups = required(config, "num_experts_per_tok"), config.get("n_group", 1)
    group_topk = config.get("topk_group", 1)
    is_grouped = num_groups != group_topk
    if is_grouped and top_k != 2 * group_topk:
        raise QADError(
            f"config.json: n_group {num_groups} and topk_group {group_topk} with num_experts_per_tok {top_k} is not "
            f"supported. Megatron scores a group by its two best experts only for num_experts_per_tok {2 * group_topk}."
        )
    if top_k > 1 and not config.get("norm_topk_prob", True):
        raise QADError(
            "config.json: norm_topk_prob false is not supported. Megatron normalizes the scores of a sigmoid router."
        )
    return router_args(
        num_experts=required(config, "n_routed_experts"),
        top_k=top_k,
        width=required(config, "moe_intermediate_size"),
        shared_width=_shared_width(config),
        latent_size=config.get("moe_latent_size"),
        sigmoid=True,
        scaling_factor=config.get("routed_scaling_factor", 1.0),
        groups=(num_groups, group_topk) if is_grouped else None,
    )


def _shared_width(config: dict) -> int | None:
    return required(config, "moe_shared_expert_intermediate_size") if config.get("n_shared_experts", 1) else None


def _head_dim(config: dict) -> int:
    head_dim = config.get("head_dim") or config.get("attention_head_dim")
    return head_dim or required(config, "hidden_size") // required(config, "num_attention_heads")


def tensors(config: dict, prefix: str = "") -> list[ParamMapping]:
    """Return the mappings of all tensors. ``prefix``: prefix of the Hugging Face names (``language_model.``)."""
    if biased := [key for key in _BIASES if config.get(key)]:
        raise QADError(f"config.json: {biased[0]} is set, but linears with biases are not supported in this family.")
    vocab, hidden = required(config, "vocab_size"), required(config, "hidden_size")
    names = (f"{prefix}backbone.embeddings.weight",)
    mappings = [ParamMapping("embedding.word_embeddings.weight", names, "embedding", (vocab, hidden))]
    layer_tensors = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}
    for layer, symbol in enumerate(layer_pattern(config)):
        mappings += layer_tensors[symbol](config, layer, f"{prefix}backbone.layers.{layer}")
    mappings.append(ParamMapping("decoder.final_norm.weight", (f"{prefix}backbone.norm_f.weight",), "norm", (hidden,)))
    if not config.get("tie_word_embeddings", False):
        head = (f"{prefix}lm_head.weight",)
        mappings.append(ParamMapping("output_layer.weight", head, "head", (vocab, hidden), is_linear=True))
    return mappings


def _mamba(config: dict, layer: int, hf: str) -> Iterator[ParamMapping]:
    hidden, num_heads = required(config, "hidden_size"), required(config, "mamba_num_heads")
    inner = num_heads * required(config, "mamba_head_dim")
    state = required(config, "n_groups") * required(config, "ssm_state_size")
    module = f"decoder.layers.{layer}.mixer"
    mixer_mapping = partial(ParamMapping, kind="mamba", layer=layer)
    yield ParamMapping(f"{module}.in_proj.layer_norm_weight", (f"{hf}.norm.weight",), "norm", (hidden,), layer)
    rows = (inner, inner, state, state, num_heads)
    yield MambaMapping(
        f"{module}.in_proj.weight",
        (f"{hf}.mixer.in_proj.weight",),
        "mamba",
        (sum(rows), hidden),
        layer,
        is_linear=True,
        parts=("z", "x", "B", "C", "dt"),
        rows=rows,
    )
    conv = partial(MambaMapping, kind="conv1d", layer=layer, parts=("x", "B", "C"), rows=(inner, state, state))
    channels = inner + 2 * state
    yield conv(
        f"{module}.conv1d.weight",
        (f"{hf}.mixer.conv1d.weight",),
        shape=(channels, 1, required(config, "conv_kernel")),
        never_quantized=True,
    )
    if config.get("use_conv_bias", True):
        yield conv(f"{module}.conv1d.bias", (f"{hf}.mixer.conv1d.bias",), shape=(channels,))
    for name in ("A_log", "D", "dt_bias"):
        yield mixer_mapping(f"{module}.{name}", (f"{hf}.mixer.{name}",), shape=(num_heads,))
    yield ParamMapping(f"{module}.norm.weight", (f"{hf}.mixer.norm.weight",), "norm", (inner,), layer)
    output = (f"{hf}.mixer.out_proj.weight",)
    yield mixer_mapping(f"{module}.out_proj.weight", output, shape=(hidden, inner), is_linear=True)


def _attention(config: dict, layer: int, hf: str) -> Iterator[ParamMapping]:
    hidden, num_heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    num_groups = config.get("num_key_value_heads") or num_heads
    head_dim = _head_dim(config)
    module = f"decoder.layers.{layer}.self_attention"
    yield ParamMapping(f"{module}.linear_qkv.layer_norm_weight", (f"{hf}.norm.weight",), "norm", (hidden,), layer)
    yield QKVMapping(
        f"{module}.linear_qkv.weight",
        tuple(f"{hf}.mixer.{x}_proj.weight" for x in "qkv"),
        "attention",
        ((num_heads + 2 * num_groups) * head_dim, hidden),
        layer,
        is_linear=True,
        num_heads=num_heads,
        num_groups=num_groups,
        head_dim=head_dim,
    )
    output, shape = (f"{hf}.mixer.o_proj.weight",), (hidden, num_heads * head_dim)
    yield ParamMapping(f"{module}.linear_proj.weight", output, "attention", shape, layer, is_linear=True)


def _mlp(config: dict, layer: int, hf: str) -> Iterator[ParamMapping]:
    hidden, module = required(config, "hidden_size"), f"decoder.layers.{layer}.mlp"
    yield ParamMapping(f"{module}.linear_fc1.layer_norm_weight", (f"{hf}.norm.weight",), "norm", (hidden,), layer)
    yield from _up_down(module, f"{hf}.mixer", "mlp", layer, hidden, required(config, "intermediate_size"))


def _experts(config: dict, layer: int, hf: str) -> Iterator[ParamMapping]:
    hidden, num_experts = required(config, "hidden_size"), required(config, "n_routed_experts")
    latent = config.get("moe_latent_size")
    module, mixer = f"decoder.layers.{layer}.mlp", f"{hf}.mixer"
    yield ParamMapping(
        f"decoder.layers.{layer}.pre_mlp_layernorm.weight", (f"{hf}.norm.weight",), "norm", (hidden,), layer
    )
    router = partial(ParamMapping, kind="router", layer=layer)
    yield router(f"{module}.router.weight", (f"{mixer}.gate.weight",), shape=(num_experts, hidden))
    bias = (f"{mixer}.gate.e_score_correction_bias",)
    yield router(f"{module}.router.expert_bias", bias, shape=(num_experts,), is_float32=True)
    if latent:  # projections to and from the latent space of the routed experts
        for name, shape in (("fc1_latent_proj", (latent, hidden)), ("fc2_latent_proj", (hidden, latent))):
            names = (f"{mixer}.{name}.weight",)
            yield ParamMapping(f"{module}.{name}.weight", names, "expert", shape, layer, is_linear=True)
    width = required(config, "moe_intermediate_size")
    for i in range(num_experts):
        expert = f"{module}.experts.experts.{i}"
        yield from _up_down(expert, f"{mixer}.experts.{i}", "expert", layer, latent or hidden, width)
    if shared := _shared_width(config):
        module = f"{module}.shared_experts"
        yield from _up_down(module, f"{mixer}.shared_experts", "shared_expert", layer, hidden, shared)


def _up_down(module: str, hf: str, kind: str, layer: int, hidden: int, width: int) -> Iterator[ParamMapping]:
    """Yield the mappings of an MLP without a gate (squared ReLU)."""
    up, down = (f"{hf}.up_proj.weight",), (f"{hf}.down_proj.weight",)
    yield ParamMapping(f"{module}.linear_fc1.weight", up, kind, (width, hidden), layer, is_linear=True)
    yield ParamMapping(f"{module}.linear_fc2.weight", down, kind, (hidden, width), layer, is_linear=True)


FAMILY = Family(
    architecture="NemotronHForCausalLM",
    layer_pattern=layer_pattern,
    megatron_args=megatron_args,
    tensors=tensors,
    rope_scaling=lambda config: None,
    passthrough_prefixes=("mtp.",),
    aliases={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
