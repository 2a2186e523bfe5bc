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

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.attention_heads import heads
from megatron_qad.models.families.base import Family, ParamMapping, QKVMapping
from megatron_qad.models.families.router_options import experts_per_token, num_experts, router_args
from megatron_qad.models.families.unbuilt import check_built

_SYMBOLS = {
    "mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E",
}  # fmt: skip
_BIASES = ("attention_bias", "mlp_bias", "mamba_proj_bias", "use_bias")
_DEFAULTS = {"head_dim": 128, "num_key_value_heads": 8}  # of transformers' config class, for keys that are missing
# Prediction layers are passed through, rotary entries have no effect without positions, and layer_types repeats the
# pattern.
_BUILT = frozenset({"num_nextn_predict_layers", "partial_rotary_factor", "layer_types"})
_KEYS = frozenset(
    ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    + ("vocab_size", "layer_norm_epsilon", "mlp_hidden_act")
    + ("hybrid_override_pattern", "mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
)
# Values that are fixed in Megatron's Mamba mixer.
_MAMBA_VALUES = {"conv_kernel": 4, "use_conv_bias": True, "layer_norm_epsilon": 1e-5, "mamba_hidden_act": "silu"}
_NO_TIME_STEP_LIMIT = 1e9  # far above every time step, which is softplus of a projection; some files have 1e30


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
    pattern = values.text(config, "hybrid_override_pattern", None)
    if pattern is None:
        blocks = values.items(config, "layers_block_type", str, None)
        if blocks is None:
            values.text(config, "hybrid_override_pattern")  # raises: it is required
        if unknown := [block for block in blocks if block not in _SYMBOLS]:
            raise QADError(
                f"{values.place(config)}: layers_block_type has {unknown[0]!r:.100}, expected {', '.join(_SYMBOLS)}."
            )
        pattern = "".join(_SYMBOLS[block] for block in blocks)
    if unknown := set(pattern) - set("M*-E"):
        raise QADError(
            f"{values.place(config)}: hybrid_override_pattern has {sorted(unknown)[0]!r}, expected M, *, - or E."
        )
    num_layers = values.integer(config, "num_hidden_layers", len(pattern), maximum=values.MAX_LAYERS)
    if not 1 <= len(pattern) <= values.MAX_LAYERS or len(pattern) != num_layers:
        raise QADError(
            f"{values.place(config)}: num_hidden_layers is {num_layers}, the layer pattern has {len(pattern)}."
        )
    return pattern


def megatron_args(config: dict) -> dict:
    """Return the Megatron options. Raises QADError for entries that Megatron would ignore or compute differently."""
    pattern, (num_heads, num_groups, head_dim) = layer_pattern(config), _heads(config)
    if (act := values.text(config, "mlp_hidden_act", "relu2")) != "relu2":
        raise QADError(f"{values.place(config)}: mlp_hidden_act {act!r:.100} is not supported. Expected 'relu2'.")
    check_built(config, _BUILT)
    has_width = "-" in pattern or config.get("intermediate_size") is not None
    ffn_key = "intermediate_size" if has_width else "moe_intermediate_size"
    shape = {
        "hybrid-layer-pattern": pattern,
        "hidden-size": values.integer(config, "hidden_size"),
        "ffn-hidden-size": values.integer(config, ffn_key),
        "num-attention-heads": num_heads,
        "group-query-attention": True,
        "num-query-groups": num_groups,
        "kv-channels": head_dim,
        "normalization": "RMSNorm",
        "norm-epsilon": values.number(config, "layer_norm_epsilon", 1e-5, above=0, maximum=1),
        "position-embedding-type": "none",
        "squared-relu": True,
        "disable-bias-linear": True,
        "untie-embeddings-and-output-weights": not values.flag(config, "tie_word_embeddings", False),
        "max-position-embeddings": values.integer(
            config, "max_position_embeddings", 4096, maximum=values.MAX_POSITIONS
        ),
        "vocab-size": values.integer(config, "vocab_size"),
    }
    if "M" in pattern:
        shape |= _mamba_args(config)
    if "E" in pattern:
        shape |= _expert_args(config)
    return shape


def _mamba_args(config: dict) -> dict:
    for key, value in _MAMBA_VALUES.items():
        if config.get(key) is not None and (type(config[key]), config[key]) != (type(value), value):
            raise QADError(
                f"{values.place(config)}: {key} {config[key]!r:.100} is not supported. Megatron's Mamba layers "
                f"have {value!r}."
            )
    if not _is_unlimited(limit := config.get("time_step_limit")):
        raise QADError(
            f"{values.place(config)}: time_step_limit {limit!r:.100} is not supported. Megatron's Mamba layers "
            "have no limits."
        )
    num_heads, num_groups = values.integer(config, "mamba_num_heads"), values.integer(config, "n_groups")
    if num_heads % num_groups:
        raise QADError(
            f"{values.place(config)}: mamba_num_heads {num_heads} is not a multiple of n_groups {num_groups}."
        )
    return {
        "mamba-num-heads": num_heads,
        "mamba-head-dim": values.integer(config, "mamba_head_dim"),
        "mamba-num-groups": num_groups,
        "mamba-state-dim": values.integer(config, "ssm_state_size"),
    }


def _is_unlimited(limit: object) -> bool:
    """Return whether a ``time_step_limit`` has no effect: it is absent, or from 0 to infinity or a huge number."""
    if not isinstance(limit, list):
        return limit is None
    if limit[1:] == [{"__float__": "Infinity"}]:  # as transformers 5 writes it
        limit = [limit[0], math.inf]
    if len(limit) != 2 or any(type(value) not in (int, float) for value in limit):
        return False
    return limit[0] == 0 and limit[1] >= _NO_TIME_STEP_LIMIT


def _expert_args(config: dict) -> dict:
    num_routed = _num_experts(config)
    top_k = experts_per_token(config, num_routed)
    num_groups = values.integer(config, "n_group", 1, maximum=num_routed)
    group_topk = values.integer(config, "topk_group", 1, maximum=num_groups)
    if num_routed % num_groups:
        raise QADError(
            f"{values.place(config)}: n_routed_experts {num_routed} is not a multiple of n_group {num_groups}."
        )
    is_grouped = num_groups != group_topk
    if is_grouped and top_k != 2 * group_topk:
        raise QADError(
            f"{values.place(config)}: n_group {num_groups} and topk_group {group_topk} with num_experts_per_tok "
            f"{top_k} is not supported. Megatron scores a group by its two best experts only for num_experts_per_tok "
            f"{2 * group_topk}."
        )
    if top_k > 1 and not values.flag(config, "norm_topk_prob", True):
        raise QADError(
            f"{values.place(config)}: norm_topk_prob false is not supported. Megatron normalizes the scores of a "
            "sigmoid router."
        )
    return router_args(
        num_experts=num_routed,
        top_k=top_k,
        width=values.integer(config, "moe_intermediate_size"),
        shared_width=_shared_width(config),
        latent_size=_latent_size(config),
        sigmoid=True,
        scaling_factor=values.number(config, "routed_scaling_factor", 1.0, above=0),
        groups=(num_groups, group_topk) if is_grouped else None,
    )


def _num_experts(config: dict) -> int:
    return num_experts(config, "n_routed_experts", layer_pattern(config).count("E"))


def _heads(config: dict) -> tuple[int, int, int]:
    if "head_dim" not in config and "attention_head_dim" in config:  # old files
        config = values.with_defaults(config, {"head_dim": config["attention_head_dim"]})
    return heads(values.with_defaults(config, _DEFAULTS))


def _latent_size(config: dict) -> int | None:
    return values.integer(config, "moe_latent_size", None)


def _shared_width(config: dict) -> int | None:
    has_shared = values.integer(config, "n_shared_experts", 1, minimum=0)
    return values.integer(config, "moe_shared_expert_intermediate_size") if has_shared else None


def tensors(config: dict, prefix: str = "") -> list[ParamMapping]:
    """Return the mappings of all tensors. ``prefix``: prefix of the Hugging Face names (``language_model.``)."""
    if biased := [key for key in _BIASES if config.get(key)]:
        raise QADError(
            f"{values.place(config)}: {biased[0]} is set, but linears with biases are not supported in this family."
        )
    vocab, hidden = values.integer(config, "vocab_size"), values.integer(config, "hidden_size")
    names = (f"{prefix}backbone.embeddings.weight",)
    mappings = [ParamMapping("embedding.word_embeddings.weight", names, "embedding", (vocab, hidden))]
    layer_tensors = {"M": _mamba, "*": _attention, "-": _mlp, "E": _experts}
    for layer, symbol in enumerate(layer_pattern(config)):
        mappings += layer_tensors[symbol](config, layer, f"{prefix}backbone.layers.{layer}")
    mappings.append(ParamMapping("decoder.final_norm.weight", (f"{prefix}backbone.norm_f.weight",), "norm", (hidden,)))
    if not values.flag(config, "tie_word_embeddings", False):
        head = (f"{prefix}lm_head.weight",)
        mappings.append(ParamMapping("output_layer.weight", head, "head", (vocab, hidden), is_linear=True))
    return mappings


def _mamba(config: dict, layer: int, hf: str) -> Iterator[ParamMapping]:
    hidden, num_heads = values.integer(config, "hidden_size"), values.integer(config, "mamba_num_heads")
    inner = num_heads * values.integer(config, "mamba_head_dim")
    state = values.integer(config, "n_groups") * values.integer(config, "ssm_state_size")
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
        shape=(channels, 1, values.integer(config, "conv_kernel", 4)),
        never_quantized=True,
    )
    if values.flag(config, "use_conv_bias", True):
        yield conv(f"{module}.conv1d.bias", (f"{hf}.mixer.conv1d.bias",), shape=(channels,))
    for name in ("A_log", "D", "dt_bias"):
        yield mixer_mapping(f"{module}.{name}", (f"{hf}.mixer.{name}",), shape=(num_heads,))
    yield ParamMapping(f"{module}.norm.weight", (f"{hf}.mixer.norm.weight",), "norm", (inner,), layer)
    output = (f"{hf}.mixer.out_proj.weight",)
    yield mixer_mapping(f"{module}.out_proj.weight", output, shape=(hidden, inner), is_linear=True)


def _attention(config: dict, layer: int, hf: str) -> Iterator[ParamMapping]:
    hidden, (num_heads, num_groups, head_dim) = values.integer(config, "hidden_size"), _heads(config)
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
    hidden, module = values.integer(config, "hidden_size"), f"decoder.layers.{layer}.mlp"
    yield ParamMapping(f"{module}.linear_fc1.layer_norm_weight", (f"{hf}.norm.weight",), "norm", (hidden,), layer)
    yield from _up_down(module, f"{hf}.mixer", "mlp", layer, hidden, values.integer(config, "intermediate_size"))


def _experts(config: dict, layer: int, hf: str) -> Iterator[ParamMapping]:
    hidden, num_routed, latent = values.integer(config, "hidden_size"), _num_experts(config), _latent_size(config)
    module, mixer = f"decoder.layers.{layer}.mlp", f"{hf}.mixer"
    yield ParamMapping(
        f"decoder.layers.{layer}.pre_mlp_layernorm.weight", (f"{hf}.norm.weight",), "norm", (hidden,), layer
    )
    router = partial(ParamMapping, kind="router", layer=layer)
    yield router(f"{module}.router.weight", (f"{mixer}.gate.weight",), shape=(num_routed, hidden))
    bias = (f"{mixer}.gate.e_score_correction_bias",)
    yield router(f"{module}.router.expert_bias", bias, shape=(num_routed,), is_float32=True)
    if latent:  # projections to and from the latent space of the routed experts
        for name, shape in (("fc1_latent_proj", (latent, hidden)), ("fc2_latent_proj", (hidden, latent))):
            names = (f"{mixer}.{name}.weight",)
            yield ParamMapping(f"{module}.{name}.weight", names, "latent", shape, layer, is_linear=True)
    width = values.integer(config, "moe_intermediate_size")
    for i in range(num_routed):
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
    model_type="nemotron_h",
    layer_pattern=layer_pattern,
    megatron_args=megatron_args,
    tensors=tensors,
    rope_scaling=lambda config: None,
    passthrough_prefixes=("mtp.",),
    aliases={"backbone.embedding.weight": "backbone.embeddings.weight"},
    config_keys=_KEYS,
)
