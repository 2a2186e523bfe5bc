"""Every value that a family or the validator reads from config.json, replaced by wrong ones: one error, soon."""

import json
import math
import time

import pytest
from tiny_configs import TINY_OF_FAMILY
from transformers import AutoConfig

from megatron_qad.checkpoint.expected_tensors import inventory
from megatron_qad.engine import QADError
from megatron_qad.models.families import family_of

CONFIGS = {name: config | {"num_experts_per_tok": 2} for name, config in TINY_OF_FAMILY.items()}
CONFIGS["nemotron_vl"] |= {"llm_config": CONFIGS["nemotron_h"]}
WRONG = ["4", 4.5, 8.0, True, -1, 0, 10**8, 10**400, math.nan, [], [[1]], {}, {"a": {"b": 1}}, "", "x" * 10_000]
MAX_SECONDS = 5.0
"""Limit of one read on a busy machine. Lists of 10^8 layers would need hours, or more memory than there is."""


class Recorder(dict):
    """A config that records which of its keys are read."""

    def __init__(self, config: dict, read: set[tuple[str, ...]], path: tuple[str, ...] = ()):
        super().__init__(config)
        self._read, self._path = read, path

    def get(self, key, default=None):
        self._read.add((*self._path, key))
        value = super().get(key, default)
        return Recorder(value, self._read, (*self._path, key)) if isinstance(value, dict) else value

    def __getitem__(self, key):
        self._read.add((*self._path, key))
        return super().__getitem__(key)


def read_all(config: dict) -> None:
    """Read everything that an import, a job, a preview and the validator read."""
    family = family_of(config)
    for function in (
        family.megatron_args,
        family.mlp_widths,
        family.rope_scaling,
        family.linears,
        family.linear_modules,
    ):
        function(config)
    family.all_tensors(config)
    family.layer_kinds(config)
    inventory(config)


def with_value(config: dict, path: tuple[str, ...], value) -> dict:
    key, *rest = path
    return config | {key: with_value(config[key], tuple(rest), value) if rest else value}


def keys_read(config: dict) -> set[tuple[str, ...]]:
    read: set[tuple[str, ...]] = set()
    family = family_of(Recorder(config, read))
    for function in (family.layer_pattern, family.tensors, family.passthrough_tensors, inventory):
        function(Recorder(config, read))
    paths = {(key,) for key in config} | {path for path in read if path[0] in config}
    return paths | {(key, inner) for key, value in config.items() if isinstance(value, dict) for inner in value}


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_values_are_one_error_or_have_no_effect(name):
    config = CONFIGS[name]
    read_all(config)
    refused, paths = 0, sorted(keys_read(config))
    assert len(paths) >= 8
    for path in paths:
        for value in [*WRONG, None]:
            started = time.perf_counter()
            try:
                read_all(json.loads(json.dumps(with_value(config, path, value))))
            except QADError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1500, (path, value)
            assert time.perf_counter() - started < MAX_SECONDS, (path, value)
    assert refused > 0.7 * len(paths) * len(WRONG)  # some values are right for some keys, and DeciLM ignores two keys


@pytest.mark.parametrize("value", [*WRONG, None], ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_sizes_take_nothing_but_sizes(key, value):
    config = CONFIGS["llama"] | {key: value}
    with pytest.raises(QADError, match=f"config.json: .*{key}"):
        family_of(config).megatron_args(config)
    with pytest.raises(QADError, match=f"config.json: .*{key}"):
        inventory(config)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000, expected an integer from 1 to 4,096"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("llama", {"head_dim": None, "hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps is nan, expected a number above 0 and at most 1"),
        ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is the text '1e-5'"),
        ("llama", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 3"),
        ("llama", {"layer_types": "full_attention"}, "layer_types is the text 'full_attention', expected a list"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings is the text 'false', expected true or false"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act is the list"),
        ("qwen3_moe", {"num_experts": 10**8}, "num_experts is 100000000, expected an integer from 1 to 131,072"),
        ("qwen3_moe", {"num_experts": 131072}, "num_experts 131072 in 2 layers are more than 131,072"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, expected an integer from 1 to 4"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, "mlp_only_layers has 3, expected blocks from 0 to 2"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1, expected a list of integers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("nemotron_h", {"hybrid_override_pattern": "M" * 5000, "num_hidden_layers": None}, "pattern has 5000"),
        ("nemotron_h", {"hybrid_override_pattern": "", "num_hidden_layers": None}, "the layer pattern has 0|no 'h"),
        ("nemotron_h", {"hybrid_override_pattern": ["M"]}, "hybrid_override_pattern is the list"),
        ("nemotron_h", {"n_groups": 3}, "mamba_num_heads 4 is not a multiple of n_groups 3"),
        ("nemotron_h", {"n_group": 2}, "n_routed_experts 3 is not a multiple of n_group 2"),
        ("nemotron_h", {"use_conv_bias": 1}, "use_conv_bias 1 is not supported"),
        ("nemotron_vl", {"llm_config": None}, "no 'llm_config', which is required"),
        ("nemotron_vl", {"llm_config": [1]}, r"llm_config is the list \[1\], expected an object"),
        ("nemotron_vl", {"llm_config": CONFIGS["nemotron_h"] | {"vocab_size": "9"}}, "llm_config: vocab_size is "),
        ("nemotron_vl", {"vision_config": {"num_hidden_layers": 10**8}}, "vision_config: num_hidden_layers is 1000"),
        ("decilm", {"block_configs": {"a": 1}}, "block_configs is the object"),
        ("decilm", {"block_configs": [{"attention": {"n_heads_in_group": 3}, "ffn": {"ffn_mult": 1.0}}] * 2},
         r"block_configs\[0\]: attention: n_heads_in_group 3 does not divide num_attention_heads 4"),
        ("decilm", {"block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_mult": "1"}}] * 2},
         r"block_configs\[0\]: ffn: ffn_mult is the text '1'"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(name, changes, message):
    config = CONFIGS[name] | changes
    with pytest.raises(QADError, match=message):
        family_of(config).megatron_args(config)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3_moe", "nemotron_h"])
def test_missing_keys_have_the_defaults_of_transformers(name):
    """A family reads a config without a key as if it had the value that transformers' config class assumes."""
    config, refused = CONFIGS[name] | {"num_attention_heads": 64, "hidden_size": 64 * 32}, set()
    for key in config.keys() - {"architectures", "model_type"}:
        without = {k: v for k, v in config.items() if k != key}
        pattern = {} if key == "hybrid_override_pattern" else {"num_hidden_layers": config["num_hidden_layers"]}
        theirs = json.loads(AutoConfig.for_model(**without).to_json_string(use_diff=False))
        full = without | {k: v for k, v in theirs.items() if k == key} | pattern
        try:
            options = family_of(without).megatron_args(without)
        except QADError:
            refused.add(key)
            continue
        assert options == family_of(full).megatron_args(full), key
        assert inventory(without) == inventory(full), key
    assert {"vocab_size", "hidden_size"} < refused
    assert not refused & {"head_dim", "num_key_value_heads", "tie_word_embeddings"}
