"""Families: Megatron options of a config, tensor mappings in both directions, errors for unsupported configs."""

import pytest
import tiny_models
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_qad.config.parallelism import possible_tensor_parallel, split_into_stages
from megatron_qad.engine import QADError
from megatron_qad.models.families import family_of
from megatron_qad.models.rope import llama3_inv_freq


def config(case: str = "llama", **changes) -> dict:
    hf_config = tiny_models.config_of(case)
    family = type(hf_config).__name__.removesuffix("Config")
    return {**hf_config.to_dict(), "architectures": [f"{family}ForCausalLM"], **changes}


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_mappings_cover_the_transformers_model_and_round_trip(case):
    model = tiny_models.transformers.AutoModelForCausalLM.from_config(tiny_models.config_of(case))
    weights = {name: torch.randn(p.shape) for name, p in model.named_parameters()}  # tied heads once
    maps = family_of(config(case)).tensors(config(case))
    assert sorted(name for m in maps for name in m.hf) == sorted(weights)
    for tensor_map in maps:
        parts = [weights[name] for name in tensor_map.hf]
        assert [tuple(p.shape) for p in parts] == tensor_map.hf_shapes()
        joined = tensor_map.to_megatron(parts)
        assert tuple(joined.shape) == tensor_map.shape
        assert all(torch.equal(a, b) for a, b in zip(tensor_map.to_hf(joined), parts, strict=True))


def test_qkv_is_grouped_by_query_group():
    qkv = next(m for m in family_of(config()).tensors(config()) if m.megatron.endswith("linear_qkv.weight"))
    queries = qkv.num_heads // qkv.num_groups
    rows = [torch.arange(shape[0]).float()[:, None].expand(shape) + start for shape, start in
            zip(qkv.hf_shapes(), (0, 10_000, 20_000), strict=True)]  # fmt: skip
    grouped = qkv.to_megatron(rows)[:, 0].reshape(qkv.num_groups, queries + 2, qkv.head_dim)
    for group in range(qkv.num_groups):
        assert grouped[group, 0, 0] == group * queries * qkv.head_dim
        assert grouped[group, -2, 0] == 10_000 + group * qkv.head_dim
        assert grouped[group, -1, 0] == 20_000 + group * qkv.head_dim


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_last_linear_is_the_head_and_knows_if_it_is_tied(case):
    linears = family_of(config(case)).linears(config(case))
    assert [linear.kind for linear in linears].count("head") == 1 and linears[-1].kind == "head"
    assert linears[-1].is_tied == tiny_models.CASES[case].tied
    assert len(linears) == 4 * config(case)["num_hidden_layers"] + 1


@pytest.mark.parametrize("case", ["llama3-rope", "llama3-rope-tied"])
def test_llama3_frequencies_equal_transformers(case):
    hf_config = tiny_models.config_of(case)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config, device="cpu")
    rope = hf_config.rope_parameters
    # The same float32 operations except for the order of a product and a quotient: two roundings of 6e-8.
    torch.testing.assert_close(
        llama3_inv_freq(hf_config.head_dim, rope["rope_theta"], rope), expected, rtol=3e-7, atol=0
    )


def test_rope_config_from_before_transformers_5():
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    old = config(rope_parameters=None, rope_scaling=rope, rope_theta=500000.0)
    assert family_of(old).megatron_args(old)["rotary-base"] == 500000
    assert family_of(old).rope_scaling(old) == {**rope, "rope_theta": 500000.0}
    assert family_of(old).megatron_args(config(rope_parameters=None, rope_theta=None))["rotary-base"] == 10000
    plain = config(rope_parameters=None, rope_theta=1e6)
    assert family_of(plain).megatron_args(plain)["rotary-base"] == 1000000
    assert family_of(plain).rope_scaling(plain) is None


def test_unsupported_family_error_lists_supported_ones():
    for architectures in (["GPT2LMHeadModel"], None):
        with pytest.raises(QADError, match="LlamaForCausalLM, Llama_Nemotron_Nano_VL, NemotronHFor"):
            family_of({"architectures": architectures})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn'.*default or llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'.*default or llama3"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, "rope_theta 10000.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "'full_attention'.*all layers"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, "sliding"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"vocab_size": None}, "'vocab_size'"),
    ],
)
def test_unsupported_config_entries_raise(changes, message):
    hf_config = config(**changes)
    with pytest.raises(QADError, match=message):
        family_of(hf_config).megatron_args(hf_config)


def test_possible_tensor_parallel_sizes():
    wide = config(num_attention_heads=12, num_key_value_heads=4, head_dim=16, intermediate_size=128)
    assert possible_tensor_parallel(family_of(wide).megatron_args(wide))[1] == [1, 2, 4]
    narrow = config(num_attention_heads=4, num_key_value_heads=4, head_dim=16, intermediate_size=96)
    assert possible_tensor_parallel(family_of(narrow).megatron_args(narrow))[1] == [1, 2]


def test_pipeline_stages_cut_the_pattern_evenly():
    assert split_into_stages("*-*-*-", 1) == "*-*-*-"
    assert split_into_stages("*-*-*-", 2) == "*-*|-*-"
    assert split_into_stages("*-*-", 4) == "*|-|*|-"
    with pytest.raises(QADError, match="at most one stage per layer"):
        split_into_stages("*-", 3)
