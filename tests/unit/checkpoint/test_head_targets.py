"""Targets of compressed-tensors groups: a quantized head is named, because vLLM does not build it as a Linear."""

import json
import sys
from pathlib import Path

import pytest
from tiny_configs import TINY_OF_FAMILY

from megatron_qad.checkpoint.layout_configs import is_head, quantization_config
from megatron_qad.models.families import family_of

sys.path.insert(0, str(Path(__file__).parent))
from exported import CONFIG, Q, edit_json, export, issues, items, linears  # noqa: E402  (a helper module in this directory)

from megatron_qad.checkpoint.hf_writer import write_hf_checkpoint  # noqa: E402


def targets(layout, formats):
    groups = quantization_config(layout, [], formats)["config_groups"]
    return [group["targets"] for group in groups.values()]


@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4-w4a16", "fp8", "int4-w4a16"])
@pytest.mark.parametrize("head", ["lm_head", "language_model.lm_head"])
def test_quantized_head_is_named_beside_linear(fmt, head):
    assert targets("compressed-tensors", {"a": fmt, head: fmt}) == [["Linear", head]]
    assert targets("compressed-tensors", {"a": fmt}) == [["Linear"]]


def test_modelopt_has_the_targets_of_modelopts_exporter():
    assert targets("modelopt", {"a": "nvfp4", "lm_head": "nvfp4"}) == [["Linear"]]


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_groups_of_several_formats_have_exact_names_only(layout):
    """Also a head whose format no other linear has."""
    formats = {"a": "nvfp4", "b": "nvfp4", "lm_head": "fp8"}
    assert targets(layout, formats) == [["lm_head"], ["a", "b"]]
    assert targets(layout, formats | {"c": "fp8"}) == [["c", "lm_head"], ["a", "b"]]


@pytest.mark.parametrize("family", TINY_OF_FAMILY)
def test_head_of_each_family_is_recognized(family):
    config = TINY_OF_FAMILY[family]
    linears = family_of(config).linears(config)
    heads = {name.removesuffix(".weight") for linear in linears if linear.kind == "head" for name in linear.hf}
    modules = [name.removesuffix(".weight") for linear in linears for name in linear.hf]
    assert {module for module in modules if is_head(module)} == heads
    assert len(heads) == 1


def with_head(directory, layout, head_format, other_format="nvfp4"):
    """Export a model whose head is quantized."""
    stream = items(unquantized=(), format_of=lambda module: head_format if module == "lm_head" else other_format)
    write_hf_checkpoint(stream, directory, config=CONFIG, layout=layout, linear_modules=linears())
    return directory


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("head_format", ["nvfp4", "fp8"])
def test_quantized_heads_are_valid(tmp_path, layout, head_format):
    directory = with_head(tmp_path / "out", layout, head_format)
    assert issues(directory) == []
    groups = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"]
    named = [target for group in groups.values() for target in group["targets"] if target == "lm_head"]
    assert len(named) == (layout == "compressed-tensors" or head_format == "fp8")


def set_targets(value, group="group_0"):
    def change(config):
        entry = config["quantization_config"]["config_groups"][group]
        if value is None:
            del entry["targets"]
        else:
            entry["targets"] = value

    return change


def test_head_that_is_not_a_target_is_reported(tmp_path):
    directory = with_head(tmp_path / "out", "compressed-tensors", "nvfp4")
    edit_json(directory / "config.json", set_targets(["Linear"]))
    assert issues(directory) == [
        "config.json: config_groups targets is ['Linear'], expected ['Linear', 'lm_head']: vLLM's output layer is not "
        "a Linear, so lm_head is named"
    ]


@pytest.mark.parametrize("value", [None, [], "Linear", ["Linear", "lm_head"], [Q], [["Linear"]], 3])
def test_wrong_targets_of_a_model_with_an_unquantized_head_are_reported(tmp_path, value):
    directory = export(tmp_path / "out", "compressed-tensors")
    edit_json(directory / "config.json", set_targets(value))
    assert any(issue.startswith("config.json: config_groups targets is ") for issue in issues(directory))


def test_head_in_the_group_of_another_format_is_reported(tmp_path):
    directory = with_head(tmp_path / "out", "compressed-tensors", "fp8")
    edit_json(directory / "config.json", set_targets(["Linear", "lm_head"], "group_1"))
    edit_json(directory / "config.json", set_targets([]))
    assert any(issue.startswith("config.json: config_groups targets is ") for issue in issues(directory))
