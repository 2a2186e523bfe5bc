"""Entries of a ``config.json`` that change a model's arithmetic or tensors and that no family here builds.

A supported family refuses them by name, because a model without them would train and export wrong values. The refusal
of another family lists them, so that the reader knows what it would take to add it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError

HOWTO = "docs/howto/add_a_family.md"


@dataclass(frozen=True)
class Unbuilt:
    """Keys of config.json that stand for one thing that is not built."""

    what: str
    """What the keys stand for."""
    keys: tuple[str, ...]
    off: tuple[Any, ...] = (None, False, 0)
    """Values with which the key has no effect."""
    is_hint: bool = False
    """Whether the keys only tell what another family is. Supported families have them without any effect."""


_ONE = (None, 1, [1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0])
_UNBUILT = (
    Unbuilt("sliding-window attention", ("sliding_window", "use_sliding_window")),
    Unbuilt("chunked attention", ("attention_chunk_size",)),
    Unbuilt("sparse attention", ("index_topk", "index_n_heads")),
    Unbuilt("attention in both directions", ("use_bidirectional_attention",)),
    Unbuilt("capped attention scores", ("attn_logit_softcapping", "attn_logit_softcap")),
    Unbuilt("capped logits", ("final_logit_softcapping", "logit_softcap", "logits_soft_cap")),
    Unbuilt("another scale of the attention scores", ("query_pre_attn_scalar", "attention_multiplier")),
    Unbuilt("queries scaled by position", ("attn_temperature_tuning",)),
    Unbuilt(
        "multi-head latent attention (MLA)",
        ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ),
    Unbuilt(
        "gated delta net layers",
        ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    ),
    Unbuilt("layers without rotary embedding", ("no_rope_layers", "no_rope_layer_interval")),
    Unbuilt("rotary embedding of a part of the head", ("partial_rotary_factor", "rotary_pct"), (None, 1)),
    Unbuilt("interleaved rotary pairs", ("rope_interleave", "rope_interleaved")),
    Unbuilt("position biases", ("alibi", "relative_attention_num_buckets")),
    Unbuilt("clipped q, k and v", ("clip_qkv",)),
    Unbuilt("q and k norms of another kind", ("use_qk_norm", "qk_layernorm", "use_qk_layernorm"), (None, False)),
    Unbuilt("biases of linears", ("attention_bias", "attention_out_bias", "mlp_bias", "projectors_bias")),
    Unbuilt("biases of linears", ("mamba_proj_bias", "use_bias", "add_bias_linear")),
    Unbuilt("LayerNorm instead of RMSNorm", ("layer_norm_eps", "norm_eps"), is_hint=True),
    Unbuilt(
        "multipliers of embedding, residual and logits",
        ("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "lm_head_multiplier"),
        _ONE,
    ),
    Unbuilt("multipliers of embedding, residual and logits", ("scale_emb", "scale_depth", "dim_model_base"), _ONE),
    Unbuilt("multipliers inside of attention, MLP and Mamba", ("key_multiplier", "mlp_multipliers"), _ONE),
    Unbuilt(
        "multipliers inside of attention, MLP and Mamba",
        ("attention_in_multiplier", "attention_out_multiplier", "ssm_multipliers"),
        _ONE,
    ),
    Unbuilt("multipliers inside of attention, MLP and Mamba", ("ssm_in_multiplier", "ssm_out_multiplier"), _ONE),
    Unbuilt("residuals in float32", ("residual_in_fp32",)),
    Unbuilt("attention parallel to the MLP", ("parallel_attn", "use_parallel_residual")),
    Unbuilt("Mamba parallel to attention in one layer", ("mamba_d_ssm",)),
    Unbuilt("shared experts with a gate", ("shared_expert_intermediate_size", "shared_intermediate_size")),
    Unbuilt("clamped MLP activations", ("swiglu_limit",)),
    Unbuilt("embeddings of each layer", ("hidden_size_per_layer_input", "vocab_size_per_layer_input")),
    Unbuilt("layers that share keys and values", ("num_kv_shared_layers",)),
    Unbuilt("multi-token prediction layers", ("num_nextn_predict_layers", "mtp_num_hidden_layers")),
    Unbuilt("token types", ("type_vocab_size",), is_hint=True),
    Unbuilt("an encoder", ("is_encoder_decoder", "encoder_layers", "num_decoder_layers", "add_cross_attention")),
    Unbuilt("vision input", ("vision_config",)),
    Unbuilt("audio input", ("audio_config", "num_mel_bins")),
)
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")
_NO_KEY = {
    "bert": "an encoder, with attention in both directions",
    "deepseek_v3": "experts with a gated MLP and a sigmoid router",
    "gemma2": "RMSNorm with weight 1 + w, norms after attention and MLP, embedding scaled by sqrt(hidden_size)",
    "gemma3": "RMSNorm with weight 1 + w, norms after attention and MLP, embedding scaled by sqrt(hidden_size)",
    "gemma3_text": "RMSNorm with weight 1 + w, norms after attention and MLP, embedding scaled by sqrt(hidden_size)",
    "glm4_moe": "experts with a gated MLP and a sigmoid router",
    "gpt_oss": "attention sinks, clamped gated MLP, biases of experts and router",
    "mixtral": "experts named block_sparse_moe.experts.N.w1 to w3",
    "olmo2": "norms after attention and MLP instead of before them, q and k norms over all heads",
    "olmo3": "norms after attention and MLP instead of before them, q and k norms over all heads",
    "phi3": "q, k and v in one tensor, gate and up in one tensor",
    "qwen3_5": "RMSNorm with weight 1 + w, a gate on the attention output",
    "qwen3_next": "RMSNorm with weight 1 + w, a gate on the attention output",
}
"""What nothing here builds of a model type, and what no entry of its config.json says."""


def unbuilt_entries(
    config: dict, built: frozenset[str] = frozenset(), *, with_hints: bool = False
) -> Iterator[tuple[str, str]]:
    """Yield (entry with its value, what it stands for) for everything that is not built.

    Args:
        config: config of the language model, or of a wrapper around it.
        built: keys that the family builds.
    """
    for entry in _UNBUILT:
        if entry.is_hint and not with_hints:
            continue
        for key in entry.keys:
            if key not in built and not _is_off(config, key, entry.off):
                yield f"{key} {_short(config[key])}", entry.what
    others = sorted({str(kind) for kind in _listed(config.get("layer_types"))} - {"full_attention"})
    if others and "layer_types" not in built:
        yield f"layer_types {', '.join(others):.200}", "layers of these types"


def check_built(config: dict, built: frozenset[str] = frozenset()) -> None:
    """Raise a ``QADError`` that names every entry of a supported family's config that is not built."""
    if found := list(unbuilt_entries(config, built)):
        raise QADError(
            f"{values.place(config)}: not supported in this family: {describe(found)}. A model without it would "
            f"compute something else. {HOWTO} explains how to add a family."
        )


def describe(found: list[tuple[str, str]]) -> str:
    """Return the entries of ``unbuilt_entries`` as one phrase, those of one kind together."""
    kinds: dict[str, list[str]] = {}
    for entry, what in found:
        kinds.setdefault(what, []).append(entry)
    return "; ".join(f"{', '.join(entries)} ({what})" for what, entries in kinds.items())


def of_other_family(config: dict, text: dict) -> list[tuple[str, str]]:
    """Return everything that is not built of another family's config. ``text``: its language model's part."""
    found = dict(unbuilt_entries(text, with_hints=True))
    found |= (
        {}
        if text is config
        else dict(unbuilt_entries({k: v for k, v in config.items() if k not in text}, with_hints=True))
    )
    for key in _ACTIVATIONS:
        if text.get(key) not in (None, "silu"):
            found[f"{key} {_short(text[key])}"] = "another activation"
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if isinstance(rope, dict):
        found |= dict(_of_rope(rope))
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _NO_KEY:
        found[f"model_type {model_type}"] = _NO_KEY[model_type]
    return list(found.items())


def _of_rope(rope: dict) -> Iterator[tuple[str, str]]:
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        yield (
            f"rope parameters for {', '.join(map(str, nested)):.200}",
            "another rotary embedding for each type of layer",
        )
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) not in ("default", "llama3"):
        yield f"rope_type {_short(rope_type)}", "another scaling of the rotary embedding"
    if rope.get("partial_rotary_factor") not in (None, 1):
        yield f"partial_rotary_factor {_short(rope['partial_rotary_factor'])}", "rotary embedding of a part of the head"


def _is_off(config: dict, key: str, off: tuple) -> bool:
    value = config.get(key)
    if key == "sliding_window" and config.get("use_sliding_window") is False:
        return True  # Qwen's files keep the size of a window that is not used
    return any(value == neutral for neutral in off) or value in ([], {})


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else []


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"of {len(value)} entries"
    return f"{value!r}" if len(repr(value)) < 60 else f"{value!r:.50}..."
