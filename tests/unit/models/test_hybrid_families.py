"""Names, shapes and sizes of Nemotron-H, Llama Nemotron Super and Nemotron Nano VL, from their configs."""

import json
import math
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_configs import TINY_HYBRID
from transformers import AutoModelForCausalLM, NemotronHConfig

from megatron_qad.checkpoint.expected_tensors import inventory
from megatron_qad.config.parallelism import possible_tensor_parallel
from megatron_qad.engine import QADError
from megatron_qad.models.families import family_of, text_config
from megatron_qad.models.families.decilm import ffn_size

CONFIGS = Path(__file__).parents[1] / "quantization" / "configs"
BLOCK = {
    "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
    "ffn": {"ffn_mult": 2.625, "no_op": False, "replace_with_linear": False},
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "vocab_size": 256,
}
ONLY_MAMBA = TINY_HYBRID | {"hybrid_override_pattern": "MM", "num_hidden_layers": 2}
NO_ATTENTION = {**BLOCK, "attention": {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}}
NO_FFN = {**BLOCK, "ffn": {"ffn_mult": None, "no_op": True, "replace_with_linear": False}}
LINEAR_ATTENTION = {**BLOCK, "attention": {"n_heads_in_group": None, "no_op": False, "replace_with_linear": True}}
LINEAR_FFN = {**BLOCK, "ffn": {"ffn_mult": None, "no_op": False, "replace_with_linear": True}}


def read(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def tensors_of(config: dict):
    return family_of(config).all_tensors(config)


def num_weights(config: dict) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors_of(config))


def decilm(*blocks: dict) -> dict:
    return {
        "architectures": ["DeciLMForCausalLM"],
        "hidden_size": 384,
        "num_attention_heads": 8,
        "vocab_size": 64,
        "num_hidden_layers": len(blocks),
        "block_configs": list(blocks),
    }


def hub_names(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Convert a transformers name to the names on the hub, which have another prefix and separate experts."""
    name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
    if ".experts." in name and not name.endswith(".weight"):
        stem, projection = name.rsplit(".", 1)
        return {f"{stem}.{i}.{projection}.weight": tuple(shape[1:]) for i in range(shape[0])}
    return {name: tuple(shape)}


@pytest.mark.parametrize("changes", [{}, {"moe_latent_size": 24}, {"use_conv_bias": False}])
def test_nemotron_h_mappings_cover_the_transformers_model(changes):
    config = TINY_HYBRID | changes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            NemotronHConfig(**{k: v for k, v in config.items() if k != "num_hidden_layers"})
        )
    expected = {}
    for name, tensor in model.state_dict().items():
        expected |= hub_names(name, tensor.shape)
    mapped = {}
    for tensor in tensors_of(config):
        mapped |= dict(zip(tensor.hf, tensor.hf_shapes(), strict=True))
    assert mapped == expected


def test_nemotron_h_mappings_round_trip():
    for tensor in tensors_of(TINY_HYBRID):
        parts = [torch.randn(shape) for shape in tensor.hf_shapes()]
        joined = tensor.to_megatron(parts)
        assert tuple(joined.shape) == tensor.shape
        assert all(torch.equal(a, b) for a, b in zip(tensor.to_hf(joined), parts, strict=True))


def test_megatron_names_are_unique_and_contain_the_layer():
    for name in ("nemotron-3-nano-30b-a3b", "llama-nemotron-super-49b", "nemotron-nano-12b-v2-vl"):
        tensors = tensors_of(read(name))
        assert max(Counter(tensor.megatron for tensor in tensors).values()) == 1
        for tensor in tensors:
            parts = tensor.megatron.split(".")
            in_decoder = parts[:2] == ["decoder", "layers"]
            assert tensor.layer == (int(parts[2]) if in_decoder else None)


def test_megatron_names_of_hybrid():
    """Names that HybridModel of megatron-core 0.19.2 saves, before Mamba components are split."""
    names = {tensor.megatron: tensor for tensor in tensors_of(TINY_HYBRID)}
    for name in (
        "decoder.layers.0.mixer.in_proj.layer_norm_weight",
        "decoder.layers.0.mixer.conv1d.weight",
        "decoder.layers.0.mixer.A_log",
        "decoder.layers.0.mixer.norm.weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.router.expert_bias",
        "decoder.layers.1.mlp.experts.experts.2.linear_fc2.weight",
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.3.mlp.linear_fc1.weight",
    ):
        assert name in names
    in_proj = names["decoder.layers.0.mixer.in_proj.weight"]
    assert dict(zip(in_proj.parts, in_proj.rows, strict=True)) == {"z": 64, "x": 64, "B": 32, "C": 32, "dt": 4}
    assert sum(in_proj.rows) == in_proj.shape[0]
    assert sum(names["decoder.layers.0.mixer.conv1d.bias"].rows) == names["decoder.layers.0.mixer.conv1d.bias"].shape[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Model cards: 49.9 B, 7.6 B, 8.9 B, 31.6 B. The last two equal the exact counts of other tools.
        ("llama-nemotron-super-49b", 49_867_145_216),
        ("acereason-nemotron-7b", 7_615_616_512),
        ("nemotron-nano-9b-v2", 8_888_227_328),
        ("nemotron-3-nano-30b-a3b", 31_577_940_288),
    ],
)
def test_known_sizes(name, expected):
    assert num_weights(read(name)) == expected


def test_language_model_of_vision_language_model():
    config = read("nemotron-nano-12b-v2-vl")
    tensors = tensors_of(config)
    vision = sum(math.prod(tensor.shape) for tensor in tensors if tensor.kind == "vision")
    assert 12.2e9 < num_weights(config) - vision < 12.4e9  # Nemotron Nano 12B V2
    assert 0.6e9 < vision < 0.9e9  # ViT-H/16 and a projector
    assert all(tensor.hf[0].startswith("language_model.") for tensor in tensors if tensor.kind != "vision")
    assert not any(tensor.is_linear for tensor in tensors if tensor.kind == "vision")
    llm_config = config["llm_config"]
    assert [t.megatron for t in tensors_of(llm_config)] == [t.megatron for t in tensors if t.kind != "vision"]
    assert family_of(config).layer_kinds(config) == family_of(llm_config).layer_kinds(llm_config)
    modules = family_of(config).linear_modules(config)
    assert "vision_model.radio_model.model.blocks.31.mlp.fc2" in modules and "mlp1.3" in modules
    assert "language_model.lm_head" in modules
    assert not any(name.startswith("mlp1.0") or ".norm" in name for name in modules)


def test_text_config_is_accepted_as_llm_config():
    config = read("nemotron-nano-12b-v2-vl")
    config["text_config"] = config.pop("llm_config")
    assert len(tensors_of(config)) == 747
    del config["text_config"]
    with pytest.raises(QADError, match="no 'llm_config'"):
        tensors_of(config)


def test_listing_many_experts_is_fast():
    config = read("nemotron-3-nano-30b-a3b")
    start = time.perf_counter()
    linears = family_of(config).linears(config)
    assert time.perf_counter() - start < 3  # 0.02 s when measured
    assert Counter(linear.kind for linear in linears) == {
        "mamba": 2 * 23,
        "expert": 2 * 128 * 23,
        "shared_expert": 2 * 23,
        "attention": 2 * 6,
        "head": 1,
    }


def test_linear_modules_are_linears_and_conv1d():
    config = TINY_HYBRID
    modules = family_of(config).linear_modules(config)
    assert {name for name in modules if ".0." in name and "experts" not in name} == {
        f"backbone.layers.0.mixer.{name}" for name in ("in_proj", "out_proj", "conv1d")
    }
    assert "lm_head" in modules and not any("gate" in name or "norm" in name for name in modules)
    assert len(modules) == len(set(modules))


def test_qwen3_moe_routers_are_on_the_exclusion_list():
    """vLLM loads routers as linears with the checkpoint's quantization config, so they must be excluded. The test also
    covers dense blocks and the name under which transformers 5 saves the number of experts."""
    config = QWEN3_MOE | {"mlp_only_layers": [1]}
    modules = set(family_of(config).linear_modules(config))
    assert {name for name in modules if name.endswith(".gate")} == {f"model.layers.{i}.mlp.gate" for i in (0, 2)}
    assert inventory(config).excluded(()) == modules
    saved = {k: v for k, v in config.items() if k != "num_experts"} | {"num_local_experts": 4}
    assert tensors_of(saved) == tensors_of(config) and inventory(saved) == inventory(config)
    assert family_of(saved).megatron_args(saved) == family_of(config).megatron_args(config)


def test_layers_block_type_equals_pattern():
    without_pattern = {k: v for k, v in TINY_HYBRID.items() if k != "hybrid_override_pattern"}
    for blocks in (
        ["mamba", "moe", "attention", "mlp", "mamba"],
        ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
    ):
        assert family_of(TINY_HYBRID).layer_pattern(without_pattern | {"layers_block_type": blocks}) == "ME*-M"
    assert family_of(TINY_HYBRID).layer_kinds(TINY_HYBRID) == ["mamba", "expert", "attention", "mlp", "mamba"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "MEX-M"}, "has 'X', expected M"),
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6, the layer pattern has 5"),
        ({"hybrid_override_pattern": None}, "no 'hybrid_override_pattern'"),
        ({"hybrid_override_pattern": None, "layers_block_type": ["rnn"]}, "layers_block_type has 'rnn'"),
        ({"mlp_bias": True}, "mlp_bias is set"),
        ({"use_bias": True}, "use_bias is set"),
        ({"ssm_state_size": None}, "no 'ssm_state_size'"),
    ],
)
def test_unsupported_nemotron_h_configs_raise(changes, message):
    with pytest.raises(QADError, match=message):
        tensors_of(TINY_HYBRID | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_kernel": 3}, "conv_kernel 3 is not supported. Megatron's Mamba layers have 4"),
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit \[0.0, 0.1\]"),
        ({"time_step_limit": [0.001, math.inf]}, r"time_step_limit \[0.001, inf\]"),
        ({"time_step_limit": [0.0, "Infinity"]}, r"time_step_limit \[0.0, 'Infinity'\]"),
        ({"time_step_limit": [0.0, None]}, r"time_step_limit \[0.0, None\]"),
        ({"time_step_limit": []}, r"time_step_limit \[\]"),
        ({"time_step_limit": 1e30}, "time_step_limit 1e.30"),
    ],
)
def test_unsupported_mamba_configs_raise(changes, message):
    with pytest.raises(QADError, match=message):
        family_of(ONLY_MAMBA).megatron_args(ONLY_MAMBA | changes)


def test_time_step_limit_without_effect(tmp_path):
    NemotronHConfig(time_step_limit=[0.0, math.inf]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["time_step_limit"]
    assert isinstance(saved[1], dict)  # transformers 5 writes infinity as a dictionary
    for limit in (saved, json.loads("[0.0, Infinity]"), [0.0, 1e30], [0, 1e20], None):
        config = ONLY_MAMBA | {"time_step_limit": limit}
        assert family_of(config).megatron_args(config) == family_of(config).megatron_args(ONLY_MAMBA)


def test_missing_attention_or_mlp_is_omitted_from_pattern():
    config = decilm(BLOCK, NO_ATTENTION, NO_FFN)
    family = family_of(config)
    assert family.layer_pattern(config) == "*--*"
    assert family.layer_kinds(config) == ["attention", "mlp", "mlp", "attention"]
    by_hf = {name: tensor for tensor in family.tensors(config) for name in tensor.hf}
    assert by_hf["model.layers.1.mlp.up_proj.weight"].megatron == "decoder.layers.2.mlp.linear_fc1.weight"
    assert (
        by_hf["model.layers.2.self_attn.q_proj.weight"].megatron == "decoder.layers.3.self_attention.linear_qkv.weight"
    )
    assert by_hf["model.layers.2.self_attn.k_proj.weight"].num_groups == 4
    absent = ("model.layers.1.self_attn", "model.layers.1.input_layernorm", "model.layers.2.mlp")
    assert not any(name.startswith(absent) for name in by_hf)


def test_replaced_layer_is_one_linear():
    config = decilm(LINEAR_ATTENTION, LINEAR_FFN)
    by_name = {tensor.hf[0]: tensor for tensor in tensors_of(config)}
    attention = by_name["model.layers.0.self_attn.linear_attn.weight"]
    assert (attention.kind, attention.shape, attention.is_linear) == ("attention", (384, 384), True)
    assert by_name["model.layers.1.mlp.linear_mlp.weight"].kind == "mlp"
    assert "model.layers.0.self_attn.o_proj.weight" not in by_name
    assert family_of(config).layer_pattern(config) == "*-*-"


def test_mlp_widths_of_super_49b():
    super_49b = {"hidden_size": 8192}
    widths = {mult: ffn_size(super_49b, {"ffn_mult": mult}) for mult in (5.25, 2.625, 3.28125, 1.3125, 1.0, 0.5)}
    assert widths == {5.25: 28672, 2.625: 14336, 3.28125: 17920, 1.3125: 7168, 1.0: 5632, 0.5: 2816}
    assert ffn_size(super_49b, {"intermediate_size": 100}) == 100
    with pytest.raises(QADError, match="without 'ffn_mult'"):
        ffn_size(super_49b, {"ffn_mult": None})


def test_number_of_block_configs_must_equal_layers():
    with pytest.raises(QADError, match="block_configs has 1 entries, num_hidden_layers is 2"):
        tensors_of(decilm(BLOCK) | {"num_hidden_layers": 2})


def test_megatron_args_of_llama_nemotron_super():
    config = read("llama-nemotron-super-49b")
    family = family_of(config)
    shape, widths = family.megatron_args(config), family.mlp_widths(config)
    assert shape["hybrid-layer-pattern"] == family.layer_pattern(config)
    assert (shape["num-query-groups"], shape["kv-channels"], shape["rotary-base"]) == (8, 128, 500000)
    pattern = shape["hybrid-layer-pattern"]
    defaults = {"attention": {"window_length": None, "unshifted_sink": False}, "ffn": {"hidden_act": "silu"}}
    blocks = [{part: entry | defaults[part] for part, entry in block.items()} for block in config["block_configs"]]
    assert family.megatron_args(config | {"block_configs": blocks}) == shape
    assert [bool(width) for width in widths] == [symbol == "-" for symbol in pattern]
    assert Counter(width for width in widths if width) == {28672: 49, 14336: 6, 17920: 1, 7168: 10, 5632: 8, 2816: 6}
    # Megatron counts FLOPs as if all MLPs had this width, and warms up a gate of this width at any TP.
    assert shape["ffn-hidden-size"] == pytest.approx(sum(widths) / pattern.count("-"), abs=128)
    assert shape["ffn-hidden-size"] % 256 == 0
    shape["mlp-widths"] = widths
    assert possible_tensor_parallel(shape)[1] == [1, 2, 4, 8]
    for tensor in family.tensors(config):
        if tensor.kind == "mlp" and tensor.megatron.endswith("linear_fc2.weight"):
            assert tensor.shape == (8192, widths[tensor.layer])


def test_tensor_parallelism_must_divide_every_mlp():
    config = decilm(BLOCK, {**BLOCK, "ffn": {"intermediate_size": 96}})
    family = family_of(config)
    shape = family.megatron_args(config | {"rms_norm_eps": 1e-5}) | {"mlp-widths": family.mlp_widths(config)}
    assert family.mlp_widths(config) == (0, 768, 0, 96)
    assert possible_tensor_parallel(shape) == (
        {
            "the attention heads": 8,
            "the key-value heads": 4,
            "the 16-element blocks of the attention output": 24,
            "the 16-element blocks of the MLP": 6,
        },
        [1, 2],
    )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([BLOCK, LINEAR_ATTENTION], r"block_configs\[1\] has 'replace_with_linear'"),
        ([LINEAR_FFN, BLOCK], r"block_configs\[0\] has 'replace_with_linear'"),
        (
            [BLOCK, {**BLOCK, "attention": {"n_heads_in_group": 4}}],
            r"n_heads_in_group \[2, 4\].*Expected at least one MLP",
        ),
        (
            [{**BLOCK, "attention": {"n_heads_in_group": 2, "window_length": 8}}],
            "has window_length 8, which is not supported",
        ),
        ([{**BLOCK, "ffn": {"ffn_mult": 1.0, "hidden_act": "relu2"}}], "has hidden_act 'relu2'"),
        ([{**BLOCK, "ffn": {"ffn_mult": 1.0, "gated": False}}], "has gated False"),
        ([BLOCK, {**BLOCK, "attention": {}}], r"n_heads_in_group \[.*None.*\]"),
        ([BLOCK, {**BLOCK, "attention": None}], r"block_configs\[1\] has no 'attention'"),
        ([BLOCK, "none"], r"block_configs\[1\] is the text 'none', expected one of a list of objects"),
        ([NO_ATTENTION], r"n_heads_in_group \[\]"),
        ([NO_FFN], "and 0 MLPs"),
    ],
)
def test_unsupported_nas_blocks_raise(blocks, message):
    config = decilm(*blocks)
    with pytest.raises(QADError, match=message):
        family_of(config).megatron_args(config)


@pytest.mark.parametrize(
    "config",
    [decilm(BLOCK, NO_ATTENTION, NO_FFN, LINEAR_ATTENTION, LINEAR_FFN), read("llama-nemotron-super-49b")],
    ids=["tiny", "super"],
)
def test_validator_inventory_of_nas_llama_matches_name_map(config):
    """The two lists of tensors are written independently."""
    listed = inventory(config | {"model_type": "nemotron-nas"})
    expected_shapes = {**listed.tensors, **{f"{module}.weight": shape for module, shape in listed.linears.items()}}
    mapped = {}
    for tensor in tensors_of(config):
        mapped |= dict(zip(tensor.hf, tensor.hf_shapes(), strict=True))
    assert expected_shapes == mapped
    assert {f"{module}.weight" for module in listed.linears} == {
        name for tensor in tensors_of(config) if tensor.is_linear for name in tensor.hf
    }
    fused = {tensor.hf for tensor in tensors_of(config) if tensor.is_linear and len(tensor.hf) > 1}
    assert {tuple(f"{module}.weight" for module in group) for group in listed.fused} == fused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_configs": None}, "block_configs describes 0 blocks"),
        ({"block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_mult": "a"}}]}, "ffn_mult 'a'"),
        ({"block_configs": [{"ffn": {"ffn_mult": 1.0}}]}, "no 'n_heads_in_group'"),
        ({"block_configs": [{"attention": 3}]}, "block_configs describes 0 blocks"),
        ({"block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_mult": float("inf")}}]}, "ffn_mult inf"),
        ({"block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_mult": float("nan")}}]}, "ffn_mult nan"),
    ],
)
def test_damaged_nas_config_raises_qad_error(changes, message):
    with pytest.raises(QADError, match=message):
        inventory(decilm(BLOCK) | {"model_type": "nemotron-nas"} | changes)


def test_megatron_builds_the_language_model_only():
    config = read("nemotron-nano-12b-v2-vl")
    family, llm_config = family_of(config), config["llm_config"]
    assert family.megatron_args(config) == family_of(llm_config).megatron_args(llm_config)
    assert family.rope_scaling(config) is None
    assert text_config(config)["vocab_size"] == 131072 and text_config(llm_config) is llm_config
    # Passthrough tensors are those outside the language model, and only those.
    assert all(
        name.startswith(family.passthrough_prefixes)
        for tensor in family.passthrough_tensors(config)
        for name in tensor.hf
    )
    assert not any(
        name.startswith(family.passthrough_prefixes) for tensor in family.tensors(config) for name in tensor.hf
    )


def test_validator_inventory_of_vision_language_model():
    config = read("nemotron-nano-12b-v2-vl")
    with pytest.raises(QADError, match="llm_config is None"):
        inventory(config | {"llm_config": None})
    listed, family = inventory(config), family_of(config)
    expected_shapes = {**listed.tensors, **{f"{module}.weight": shape for module, shape in listed.linears.items()}}
    mapped = {}
    for tensor in family.tensors(config):
        mapped |= dict(zip(tensor.hf, tensor.hf_shapes(), strict=True))
    assert expected_shapes == mapped
    assert all(listed.is_passthrough(name) for tensor in family.passthrough_tensors(config) for name in tensor.hf)
    assert not any(map(listed.is_passthrough, mapped))


def test_unsupported_family_error_lists_supported_ones():
    with pytest.raises(QADError, match="'GPT2LMHeadModel' is not supported. Supported: DeciLM.*, Qwen3Moe"):
        family_of({"architectures": ["GPT2LMHeadModel"]})
