"""Validator with several formats and an FP8 KV cache: exports are valid, and every kind of damage is reported."""

import sys
from pathlib import Path

import pytest
import torch

from megatron_qad.checkpoint.hf_writer import write_hf_checkpoint
from megatron_qad.checkpoint.validate import validate_nvfp4

sys.path.insert(0, str(Path(__file__).parent))
from exported import (  # noqa: E402  (a helper module in this directory)
    CONFIG,
    DOWN,
    RECORD,
    UP,
    K,
    Q,
    V,
    drop,
    edit,
    edit_json,
    issues,
    items,
    linears,
    poke,
    put,
)


def mixed_format(module):
    """Return FP8 for attention, NVFP4 for gate and up, and weight-only NVFP4 for down."""
    return "fp8" if "self_attn" in module else "nvfp4-w4a16" if module.endswith("down_proj") else "nvfp4"


def export_mixed(directory, layout, format_of=mixed_format, kv_cache="fp8"):
    stream = items(format_of=format_of, kv_layout=layout if kv_cache == "fp8" else None)
    arguments = {
        "config": CONFIG,
        "layout": layout,
        "linear_modules": linears(),
        "kv_cache": kv_cache,
        "record": RECORD,
    }
    write_hf_checkpoint(stream, directory, **arguments)
    return directory


@pytest.mark.parametrize("kv_cache", ["bf16", "fp8"])
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_mixed_exports_are_valid(tmp_path, layout, kv_cache):
    for name, format_of in (("mixed", mixed_format), ("fp8", lambda m: "fp8"), ("w4a16", lambda m: "nvfp4-w4a16")):
        result = validate_nvfp4(export_mixed(tmp_path / name, layout, format_of, kv_cache))
        assert not result.issues, "\n".join(map(str, result.issues))
        assert result.quantized == {module: format_of(module) for module in linears() if module != "lm_head"}
        assert result.kv_cache == kv_cache
    assert f"8 fp8, 4 nvfp4, 2 nvfp4-w4a16, KV cache {kv_cache}" in validate_nvfp4(tmp_path / "mixed").summary()


def drop_layer(config):
    del config["quantization_config"]["quantized_layers"][DOWN]


MIXED_DAMAGE = {
    "fp8 input scale missing": (drop(f"{Q}.input_scale"), f"{Q}.input_scale: is missing"),
    "fp8 weight scale missing": (drop(f"{Q}.weight_scale"), f"{Q}.weight_scale: is missing"),
    "fp8 weight missing": (drop(f"{Q}.weight"), f"{Q}.weight: is missing"),
    "fp8 weight in BF16": (
        put(f"{Q}.weight", lambda t: t.float().bfloat16()),
        f"{Q}.weight: is BF16, expected F8_E4M3",
    ),
    "fp8 weight NaN": (poke(f"{Q}.weight", 0x7F), f"{Q}.weight: has 1 NaN"),
    "fp8 weight half": (put(f"{Q}.weight", lambda t: t[:, :16].clone()), f"{Q}.weight: has shape [32, 16]"),
    "fp8 fused scales differ": (put(f"{K}.weight_scale", lambda t: t * 2), f"{K}.weight_scale: is "),
    "fp8 fused input scales differ": (put(f"{V}.input_scale", lambda t: t * 2), f"{V}.input_scale: is "),
    "weight-only with an input scale": (put(f"{DOWN}.input_scale", torch.tensor(1.0)), "config.json: "),
    "nvfp4 input scale missing": (drop(f"{UP}.input_scale"), f"{UP}.input_scale: is missing"),
    "k scale missing": (drop(f"{K}.k_scale"), f"{K}.k_scale: is missing"),
    "v scale missing": (drop(f"{V}.v_scale"), f"{V}.v_scale: is missing"),
    "k scale NaN": (put(f"{K}.k_scale", torch.tensor(float("nan"))), f"{K}.k_scale: is nan"),
    "k scale that vLLM rounds": (
        put(f"{K}.k_scale", torch.tensor(0.1)),
        f"{K}.k_scale: is 0.10000000149011612, expected a bfloat16 number such as 0.10009765625",
    ),
    "v scale of shape [1]": (put(f"{V}.v_scale", lambda t: t.reshape(1)), f"{V}.v_scale: has shape [1], expected []"),
}


@pytest.mark.parametrize("case", MIXED_DAMAGE)
def test_damaged_mixed_export_is_reported(tmp_path, case):
    change, text = MIXED_DAMAGE[case]
    directory = export_mixed(tmp_path / "out", "modelopt")
    edit(directory, change)
    reported = issues(directory)
    assert any(issue.startswith(text) for issue in reported), reported


def set_in(*path_and_value):
    *path, key, value = path_and_value

    def change(config):
        for part in path:
            config = config[part]
        config[key] = value

    return change


@pytest.mark.parametrize(
    "layout, file, change, text",
    [
        ("modelopt", "config.json", drop_layer, "config.json: quantization_config.quantized_layers"),
        (
            "modelopt",
            "hf_quant_config.json",
            set_in("quantization", "quantized_layers", Q, {"quant_algo": "NVFP4"}),
            "hf_quant_config.json: quantization.quantized_layers",
        ),
        (
            "modelopt",
            "config.json",
            set_in("quantization_config", "quant_algo", "NVFP4"),
            "config.json: quantization_c",
        ),
        (
            "modelopt",
            "config.json",
            set_in("quantization_config", "kv_cache_scheme", None),
            "config.json: kv_cache_sch",
        ),
        (
            "modelopt",
            "hf_quant_config.json",
            set_in("quantization", "kv_cache_quant_algo", None),
            "hf_quant_config.json: quantization.kv_cache_quant_algo is None, expected 'FP8'",
        ),
        (
            "compressed-tensors",
            "config.json",
            set_in("quantization_config", "config_groups", "group_0", "targets", [Q]),
            "config.json: config_groups targets",
        ),
        (
            "compressed-tensors",
            "config.json",
            set_in("quantization_config", "kv_cache_scheme", None),
            "config.json: kv_cache_scheme is None",
        ),
    ],
)
def test_wrong_mixed_configuration_is_reported(tmp_path, layout, file, change, text):
    directory = export_mixed(tmp_path / "out", layout)
    edit_json(directory / file, change)
    reported = issues(directory)
    assert any(issue.startswith(text) for issue in reported), reported


def test_declared_kv_cache_without_scales_is_reported(tmp_path):
    directory = export_mixed(tmp_path / "out", "modelopt")
    for name in (f"model.layers.{i}.self_attn.{x}_proj.{x}_scale" for i in (0, 1) for x in "kv"):
        edit(directory, drop(name))
    (issue, *_) = [f for f in issues(directory) if "kv_cache_scheme" in f]
    assert "no k_scale and v_scale are stored" in issue


def test_fused_group_of_two_formats_is_reported(tmp_path):
    directory = export_mixed(
        tmp_path / "out", "modelopt", lambda m: "fp8" if m.endswith(("q_proj", "up_proj")) else "nvfp4"
    )
    reported = issues(directory)
    assert f"{K}: is nvfp4, but {Q} is fp8; expected one format, servers fuse them" in reported
    assert any(f.startswith(f"{UP}: is fp8, but ") for f in reported)
