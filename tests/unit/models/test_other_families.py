"""Models of other families: the refusal names the nearest family and what of the config nothing here builds."""

import json

import pytest
from tiny_configs import TINY_HYBRID, TINY_LLAMA, TINY_OF_FAMILY
from transformers import AutoConfig

from megatron_qad.engine import QADError
from megatron_qad.models.families import FAMILIES, family_of

LLAMA, QWEN3_MOE, HYBRID = "LlamaForCausalLM", "Qwen3MoeForCausalLM", "NemotronHForCausalLM"

# model_type: (architecture, nearest family, what is not built)
OTHERS = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        LLAMA,
        ("sliding_window 4096", "query_pre_attn_scalar 256", "gelu_pytorch_tanh", "vision_config", "1 + w")
        + ("rope parameters for full_attention, sliding_attention", "layer_types sliding_attention"),
    ),
    "mistral": ("MistralForCausalLM", LLAMA, ("sliding_window 4096 (sliding-window attention)",)),
    "gpt_oss": (
        "GptOssForCausalLM",
        QWEN3_MOE,
        ("sliding_window 128", "attention_bias True", "rope_type 'yarn'", "attention sinks"),
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        QWEN3_MOE,
        ("kv_lora_rank 512", "q_lora_rank 1536", "v_head_dim 128", "(MLA)", "rope_interleave True"),
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        QWEN3_MOE,
        ("linear_num_key_heads 16", "gated delta net", "partial_rotary_factor 0.25", "layer_types linear_attention")
        + ("shared_expert_intermediate_size 512", "a gate on the attention output"),
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        "Qwen3ForCausalLM",
        ("linear_num_value_heads 32", "partial_rotary_factor 0.25", "vision_config", "1 + w"),
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        QWEN3_MOE,
        ("partial_rotary_factor 0.5", "num_nextn_predict_layers 1", "sigmoid router"),
    ),
    "phi3": ("Phi3ForCausalLM", "Qwen3ForCausalLM", ("q, k and v in one tensor",)),
    "granite": ("GraniteForCausalLM", LLAMA, ("attention_multiplier 1.0",)),
    "olmo2": ("Olmo2ForCausalLM", LLAMA, ("norms after attention", "q and k norms over all heads")),
    "falcon_h1": ("FalconH1ForCausalLM", HYBRID, ("mamba_d_ssm 1024 (Mamba parallel to attention",)),
    "bert": ("BertLMHeadModel", None, ("layer_norm_eps 1e-12 (LayerNorm", "type_vocab_size 2", "hidden_act 'gelu'")),
    "t5": ("T5ForConditionalGeneration", None, ("is_encoder_decoder True", "relative_attention_num_buckets 32")),
    "whisper": ("WhisperForConditionalGeneration", None, ("an encoder", "num_mel_bins 80 (audio input)")),
    "llama4": ("Llama4ForConditionalGeneration", LLAMA, ("attention_chunk_size 8192", "no_rope_layers", "use_qk_norm")),
    "mixtral": ("MixtralForCausalLM", QWEN3_MOE, ("block_sparse_moe",)),
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_refusal_names_the_nearest_family_and_what_is_not_built(model_type):
    architecture, nearest, parts = OTHERS[model_type]
    config = json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=False))
    with pytest.raises(QADError) as raised:
        family_of(config | {"architectures": [architecture]})
    message = str(raised.value)
    assert f"architecture {architecture!r} (model_type {model_type!r}) is not supported." in message
    assert f"Supported: {', '.join(sorted(FAMILIES))}." in message
    assert (f"The nearest is {nearest}: " if nearest else "No supported family is similar.") in message
    assert "docs/howto/add_a_family.md" in message and "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["X"], "model_type": ["llama"], "rope_parameters": [1], "layer_types": "full_attention"},
        {"architectures": ["X"], "text_config": "none", "rope_scaling": {"type": ["yarn"]}, "layer_types": [[1], None]},
        {"architectures": ["X"], "text_config": {"sliding_window": [[]] * 9}, "rope_parameters": {"a": {}, 1: {}}},
        {"architectures": ["X"], "sliding_window": "9" * 1000, "hidden_act": {"a": 1}},
    ],
)
def test_damaged_configs_of_other_families_are_one_error(config):
    with pytest.raises(QADError, match="is not supported. Supported: ") as raised:
        family_of(config)
    assert len(str(raised.value)) < 1500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": []}, "architecture '\\(no entry\\)'"),
        ({"architectures": None}, "architecture '\\(no entry\\)'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is the text 'LlamaForCausalLM', expected a list"),
        ({"architectures": [7]}, r"architectures\[0\] is 7, expected one of a list of strings"),
        (
            {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]},
            "LlamaForCausalLM, Qwen2ForCausalLM. Expected one",
        ),
        ({"architectures": ["X", "LlamaForCausalLM"]}, "X, LlamaForCausalLM. Expected one"),
        ({"model_type": "qwen2"}, "is LlamaForCausalLM, but model_type is 'qwen2', expected 'llama'"),
        ({"model_type": 5}, "model_type is 5, expected text"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "is Qwen2ForCausalLM, but model_type is 'llama', expected 'qwen2'"),
    ],
)
def test_architecture_must_be_one_and_agree_with_the_model_type(changes, message):
    with pytest.raises(QADError, match=message):
        family_of(TINY_LLAMA | changes)


UNBUILT = {
    "sliding_window": 4096,
    "attention_chunk_size": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "kv_lora_rank": 512,
    "rope_interleaved": True,
    "attention_bias": True,
    "mlp_bias": True,
    "use_qk_norm": True,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "swiglu_limit": 7.0,
    "partial_rotary_factor": 0.5,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "use_bidirectional_attention": True,
    "num_nextn_predict_layers": 1,
}


@pytest.mark.parametrize(
    ("family", "key"),
    [
        (family, key)
        for key in UNBUILT
        for family in ("llama", "qwen3", "qwen3_moe")
        if family == "llama" or key != "use_qk_norm"
    ],  # Qwen3 has these norms
)
def test_supported_family_with_something_that_is_not_built_is_refused_by_name(family, key):
    config = TINY_OF_FAMILY[family] | {"use_sliding_window": True, key: UNBUILT[key]}
    if key != "sliding_window":
        del config["use_sliding_window"]
    with pytest.raises(QADError, match=key):
        family_of(config).megatron_args(config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 70}),
        (  # Qwen3-Coder-30B-A3B and 480B-A35B
            "qwen3_moe",
            {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0, "use_sliding_window": False},
        ),
        ("qwen3", {"sliding_window": 4096, "attention_bias": False}),  # the default of use_sliding_window is false
        ("llama", {"rope_interleaved": False, "mlp_bias": False, "sliding_window": None, "pretraining_tp": 1}),
        ("llama", {"layer_types": ["full_attention"] * 3, "embedding_multiplier": 1.0, "vision_config": None}),
        (
            "nemotron_h",
            {"num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5, "rope_theta": 10000, "norm_eps": 1e-5},
        ),
    ],
)
def test_entries_without_effect_are_accepted(family, changes):
    config = TINY_OF_FAMILY[family] | {"num_experts_per_tok": 2}
    assert family_of(config).megatron_args(config | changes) == family_of(config).megatron_args(config)


def test_several_things_are_one_error():
    config = TINY_LLAMA | {"sliding_window": 8, "logit_softcap": 30.0, "mlp_bias": True}
    with pytest.raises(QADError, match="sliding_window 8 .*logit_softcap 30.0 .*mlp_bias True"):
        family_of(config).megatron_args(config)
    with pytest.raises(QADError, match="residual_in_fp32 True .residuals in float32"):
        family_of(TINY_HYBRID).megatron_args(TINY_HYBRID | {"residual_in_fp32": True})


def test_model_without_a_head_is_of_the_same_family():
    assert family_of(TINY_LLAMA | {"architectures": ["LlamaModel"]}) is FAMILIES["LlamaForCausalLM"]
    with pytest.raises(QADError, match="architecture 'GPT2Model'"):
        family_of({"architectures": ["GPT2Model"]})


@pytest.mark.parametrize("only_differences", [True, False])
@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [(family.model_type, name) for name, family in FAMILIES.items() if family.model_type in ("llama", "nemotron_h")]
    + [(family.model_type, name) for name, family in FAMILIES.items() if family.model_type.startswith("qwen")],
)
def test_configs_as_transformers_saves_them_are_accepted(model_type, architecture, only_differences):
    config = json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=only_differences))
    config["architectures"] = [architecture]
    assert family_of(config).megatron_args(config)["vocab-size"] == config["vocab_size"]
