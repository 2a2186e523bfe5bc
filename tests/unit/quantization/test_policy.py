"""Tests of policy files and overrides: matching, precedence and error messages."""

from dataclasses import dataclass

import pytest
import yaml

from megatron_qad.engine import QADError
from megatron_qad.quantization.policy import load, resolve


@dataclass
class Linear:
    megatron: str
    kind: str
    is_tied: bool = False

    @property
    def layer(self) -> int | None:
        parts = self.megatron.split(".")
        return int(parts[2]) if parts[:2] == ["decoder", "layers"] else None


LINEARS = [
    Linear("decoder.layers.0.self_attention.linear_qkv.weight", "attention"),
    Linear("decoder.layers.0.self_attention.linear_proj.weight", "attention"),
    Linear("decoder.layers.1.mlp.linear_fc1.weight", "mlp"),
    Linear("decoder.layers.11.mlp.linear_fc1.weight", "mlp"),
    Linear("output_layer.weight", "head"),
]
TIED = [*LINEARS[:-1], Linear("output_layer.weight", "head", is_tied=True)]


def write(tmp_path, document) -> str:
    file = tmp_path / "policy.yaml"
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return str(file)


def test_nvfp4_all_linear_quantizes_decoder_but_not_head():
    formats = resolve(load("nvfp4-all-linear"), LINEARS)
    assert formats.pop("output_layer.weight") == "bf16"
    assert set(formats) == {linear.megatron for linear in LINEARS[:-1]} and set(formats.values()) == {"nvfp4"}


def test_bf16_quantizes_nothing():
    assert set(resolve(load("bf16"), LINEARS).values()) == {"bf16"}


def test_overrides_come_last_and_win():
    rules = load("nvfp4-all-linear", ["head=nvfp4", "decoder.layers.1.*=bf16", "mlp=nvfp4", "*.layers.0.*proj=bf16"])
    formats = resolve(rules, LINEARS)
    assert formats["output_layer.weight"] == "nvfp4"
    assert formats["decoder.layers.1.mlp.linear_fc1.weight"] == "nvfp4"  # mlp=nvfp4 came after
    assert formats["decoder.layers.0.self_attention.linear_proj.weight"] == "bf16"


def test_pattern_matches_full_names():
    rules = load("nvfp4-all-linear", ["decoder.layers.1.*=bf16"])
    formats = resolve(rules, LINEARS)
    assert formats["decoder.layers.1.mlp.linear_fc1.weight"] == "bf16"
    assert formats["decoder.layers.11.mlp.linear_fc1.weight"] == "nvfp4"


def test_load_policy_from_yaml_file(tmp_path):
    document = {
        "rules": [{"kind": ["attention", "mlp", "head"], "format": "bf16"}, {"name": "*fc1", "format": "nvfp4"}]
    }
    formats = resolve(load(write(tmp_path, document)), LINEARS)
    assert [name for name, fmt in formats.items() if fmt == "nvfp4"] == [linear.megatron for linear in LINEARS[2:4]]


@pytest.mark.parametrize(
    "document, message",
    [
        ("- a\n- b\n", "a list named 'rules'"),
        ({"rules": [], "other": 1}, "unknown key 'other'"),
        ({"rules": {"kind": "mlp"}}, "a list named 'rules'"),
        ("", "a list named 'rules'"),
        ({"rules": [{"kind": "mlp"}]}, "'format' and at least one of kind, layer"),
        ({"rules": ["mlp=bf16"]}, "'format' and at least one of kind, layer"),
        (
            {"rules": [{"kind": "mlp", "format": "fp6"}]},
            "unknown format 'fp6' (did you mean 'fp8'?). Choose one of",
        ),
        (
            {"rules": [{"kind": "experts", "format": "bf16"}]},
            "unknown kind 'experts' (did you mean 'expert'?). Choose one of attention, mamba, mlp",
        ),
        ("rules: [}", "not valid YAML"),
    ],
)
def test_policy_file_errors_name_the_file(tmp_path, document, message):
    file = write(tmp_path, document)
    with pytest.raises(QADError) as error:
        load(file)
    assert file in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("policy", ["nvfp4-al-linear", "missing.yaml"])
def test_unknown_policy_lists_shipped_policies(policy):
    with pytest.raises(QADError, match=f"no quantization policy '{policy}'.*bf16,.* nvfp4-all-linear"):
        load(policy)


@pytest.mark.parametrize(
    "rule, message", [("head", "expected KIND=FORMAT or PATTERN=FORMAT"), ("head=int4", "unknown format 'int4'")]
)
def test_override_errors_name_the_override(rule, message):
    with pytest.raises(QADError) as error:
        load("bf16", [rule])
    assert f"--qad-policy-override {rule}" in str(error.value).replace("'head'", "head") and message in str(error.value)


def test_rule_that_matches_no_linear_is_an_error():
    with pytest.raises(QADError, match=r"rule decoder\.layers\.7\.\*=bf16 matches no linear.*linear_qkv"):
        resolve(load("bf16", ["decoder.layers.7.*=bf16"]), LINEARS)


def test_linear_without_a_matching_rule_is_an_error(tmp_path):
    rules = load(write(tmp_path, {"rules": [{"kind": ["attention", "mlp"], "format": "nvfp4"}]}))
    with pytest.raises(QADError, match=r"no policy rule matches output_layer\.weight \(head\)"):
        resolve(rules, LINEARS)


def test_tied_head_stays_in_bf16():
    assert resolve(load("nvfp4-all-linear"), TIED)["output_layer.weight"] == "bf16"
    with pytest.raises(QADError, match="tied to its embedding table.*Keep head=bf16"):
        resolve(load("nvfp4-all-linear", ["head=nvfp4"]), TIED)
