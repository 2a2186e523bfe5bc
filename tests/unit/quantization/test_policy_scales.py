"""Tests of the policy keys ``scales`` and ``update``: parsing, precedence, experts, and the tables that show them."""

from dataclasses import dataclass

import pytest
import yaml

from megatron_qad.engine import QADError
from megatron_qad.quantization.format_table import format_rows, render
from megatron_qad.quantization.policy import load, resolve, resolve_scales
from megatron_qad.quantization.rules import parse_override
from megatron_qad.quantization.scale_settings import NEW_JOBS, ScaleSetting


@dataclass
class Linear:
    megatron: str
    kind: str
    layer: int | None
    is_tied: bool = False
    shape: tuple[int, ...] = (32, 64)
    hf: tuple[str, ...] = ("w.weight",)


def expert(index: int, projection: str) -> Linear:
    return Linear(f"decoder.layers.2.mlp.experts.experts.{index}.{projection}.weight", "expert", 2)


QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
LINEARS = [
    Linear(QKV, "attention", 0),
    Linear(FC1, "mlp", 1),
    *(expert(index, projection) for index in range(2) for projection in ("linear_fc1", "linear_fc2")),
    Linear("output_layer.weight", "head", None),
]
EXPERT = LINEARS[2].megatron


def write(tmp_path, *rules) -> str:
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump({"rules": list(rules)}))
    return str(file)


ALL = {"kind": ["attention", "mlp", "expert", "head"], "format": "nvfp4"}


def test_settings_come_from_the_last_rule_that_matches(tmp_path):
    """A later rule replaces an earlier one completely: keys that it leaves out take their defaults."""
    policy = load(
        write(tmp_path, ALL | {"scales": "mse", "update": "frozen"}, {"kind": "mlp", "format": "nvfp4-w4a16"}),
        ["expert=nvfp4:four_over_six:frozen", "head=fp8"],
    )
    scales = resolve_scales(policy, LINEARS)
    assert "output_layer.weight" not in scales  # FP8 has no block scales
    assert {name: str(scale) for name, scale in scales.items() if "experts" not in name} == {
        QKV: "mse:frozen",
        FC1: str(NEW_JOBS),
    }
    assert {str(scale) for name, scale in scales.items() if "experts" in name} == {"four_over_six:frozen"}
    assert resolve_scales(policy, LINEARS, default=ScaleSetting("max"))[FC1] == ScaleSetting("max", "every_step")
    assert resolve(policy, LINEARS)[EXPERT] == "nvfp4"


@pytest.mark.parametrize(
    "text, result",
    [
        ("head=nvfp4", ("nvfp4", None, None)),
        ("head=nvfp4:mse", ("nvfp4", "mse", None)),
        ("head=nvfp4:frozen", ("nvfp4", None, "frozen")),
        ("*.mlp.*=nvfp4-w4a16:four_over_six:frozen", ("nvfp4-w4a16", "four_over_six", "frozen")),
        ("kind:mlp+expert,first:4=nvfp4:max:every_step", ("nvfp4", "max", "every_step")),
        ("head=fp8:max", ("fp8", "max", None)),
    ],
)
def test_rules_on_the_command_line(text, result):
    rule = parse_override(text)
    assert rule.result == result and str(rule) == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("head=nvfp4:four_over_sixx", "unknown scale rule or update 'four_over_sixx' (did you mean 'four_over_six'?)"),
        ("head=nvfp4:frosen", "(did you mean 'frozen'?)"),
        ("head=nvfp4:mse:max", "found 'mse' and 'max', expected one of them"),
        ("head=nvfp4:frozen:every_step", "found 'frozen' and 'every_step', expected one of them"),
        ("head=fp8:mse", "found 'scales: mse' with format fp8"),
        ("head=int4-w4a16:frozen", "found 'update: frozen' with format int4-w4a16"),
        ("head=bf16:four_over_six", "choose a format with block scales: nvfp4, nvfp4-w4a16."),
    ],
)
def test_errors_of_rules_on_the_command_line(text, message):
    with pytest.raises(QADError) as error:
        parse_override(text)
    assert f"--qad-policy-override {text}" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    "rule, message",
    [
        (ALL | {"scales": "mean"}, "unknown scale rule 'mean'"),
        (ALL | {"update": True}, "unknown update True"),
        (ALL | {"updates": "frozen"}, "unknown key 'updates' (did you mean 'update'?)"),
        (ALL | {"format": "fp8", "scales": "mse"}, "whose scales always follow from the largest magnitude"),
        ({"format": "nvfp4", "scales": "mse"}, "A rule needs at least one of kind, layer"),
    ],
)
def test_errors_of_policy_files(tmp_path, rule, message):
    file = write(tmp_path, rule)
    with pytest.raises(QADError) as error:
        load(file)
    assert file in str(error.value) and message in str(error.value)


def test_experts_of_a_layer_have_one_setting(tmp_path):
    rule = {"name": "*.experts.1.linear_fc1", "format": "nvfp4", "update": "frozen"}
    policy = load(write(tmp_path, ALL, rule))
    resolve(policy, LINEARS)  # the formats agree
    message = r"experts\.1\.linear_fc1 has scales max:frozen, but .*experts\.0\.linear_fc1 of the same layer has max\."
    with pytest.raises(QADError, match=message):
        resolve_scales(policy, LINEARS, default=ScaleSetting("max"))
    explicit = load(write(tmp_path, ALL, rule | {"update": "every_step", "scales": "max"}))
    resolve_scales(explicit, LINEARS, default=ScaleSetting("max"))  # says what the others have by default
    with pytest.raises(QADError, match="Give them one scale setting"):
        resolve_scales(explicit, LINEARS, default=ScaleSetting("mse"))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, "four_over_six:frozen"),
        ({"scales": "mse"}, "mse"),
        ({"update": "frozen"}, "four_over_six:frozen"),
        ({"update": "every_step"}, "four_over_six"),
    ],
)
def test_what_a_rule_does_not_say_of_its_scales(tmp_path, rule, expected):
    """A rule that names neither key takes the job's setting. One with a scale rule alone means every step."""
    scales = resolve_scales(load(write(tmp_path, ALL | rule)), LINEARS, default=ScaleSetting("four_over_six", "frozen"))
    assert str(scales[FC1]) == expected


def test_rule_whose_scales_are_all_overridden_has_no_effect(tmp_path):
    mlp = {"kind": "mlp", "format": "nvfp4"}
    with pytest.raises(QADError, match="'mlp=nvfp4:mse' has no effect"):
        resolve(load(write(tmp_path, ALL, mlp | {"scales": "mse"}, mlp | {"update": "frozen"})), LINEARS)


def test_table_shows_settings_only_if_one_is_not_the_default(tmp_path):
    policy = load(write(tmp_path, ALL))
    formats = resolve(policy, LINEARS)
    table = "\n".join(render(format_rows(LINEARS, formats, resolve_scales(policy, LINEARS))))
    assert table == "\n".join(render(format_rows(LINEARS, formats)))
    policy = load(write(tmp_path, ALL), ["expert=nvfp4:four_over_six:frozen", "head=fp8"])
    rows = format_rows(LINEARS, resolve(policy, LINEARS), resolve_scales(policy, LINEARS))
    lines = [line.split() for line in render(rows)]
    header = lines[0].index("scales")
    assert lines[0][header - 1] == "format"
    assert [line[-3] for line in lines[1:4]] == ["mse:frozen", "mse:frozen", "four_over_six:frozen"]
    assert lines[3][2].endswith("experts.{0..1}.linear_fc1")
    assert lines[5][2] == "output_layer" and lines[5][-3] == "fp8"  # no setting


def test_rule_that_needs_statistics_of_inputs_needs_frozen_scales():
    policy = load("nvfp4-all-linear", ["expert=nvfp4", "head=nvfp4:local_hessian"])
    with pytest.raises(QADError, match=r"output_layer\.weight has the scale rule local_hessian, .*'update: frozen'"):
        resolve_scales(policy, LINEARS)
    with pytest.raises(QADError, match="local_hessian"):
        resolve_scales(load("nvfp4-all-linear"), LINEARS, default=ScaleSetting("local_hessian"))
    frozen = load("nvfp4-all-linear", ["head=nvfp4:local_hessian:frozen"])
    assert resolve_scales(frozen, LINEARS)["output_layer.weight"] == ScaleSetting("local_hessian", "frozen")
