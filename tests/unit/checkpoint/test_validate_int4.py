"""INT4 in the compressed-tensors layout: valid directories pass, and every damage is reported by name."""

import sys
from pathlib import Path

import pytest
import torch

from megatron_qad.checkpoint.hf_writer import write_hf_checkpoint
from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine.errors import QADError

sys.path.insert(0, str(Path(__file__).parent))
from exported import CONFIG, DOWN, RECORD, Q, drop, edit, edit_json, issues, items, linears, put  # noqa: E402

WIDE = {**CONFIG, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}


def export_int4(directory: Path, layout: str = "compressed-tensors", attention: str = "int4-w4a16") -> Path:
    stream = items(WIDE, format_of=lambda module: attention if "self_attn" in module else "int4-w4a16")
    write_hf_checkpoint(stream, directory, config=WIDE, layout=layout, linear_modules=linears(WIDE), record=RECORD)
    return directory


@pytest.mark.parametrize("attention, number", [("int4-w4a16", 14), ("nvfp4", 6), ("nvfp4-w4a16", 6), ("fp8", 6)])
def test_int4_directories_are_valid(tmp_path, attention, number):
    result = validate_nvfp4(export_int4(tmp_path / "out", attention=attention))
    assert not result.issues, "\n".join(map(str, result.issues))
    assert list(result.quantized.values()).count("int4-w4a16") == number
    assert len(result.quantized) == 14


def test_the_modelopt_layout_is_refused(tmp_path):
    with pytest.raises(QADError, match=r"\.weight: int4-w4a16 is exported by --layout compressed-tensors only"):
        export_int4(tmp_path / "out", "modelopt")
    assert not (tmp_path / "out").exists()


def first_scale(value: float):
    def change(tensors):
        tensors[f"{DOWN}.weight_scale"][0, 0] = value

    return change


DAMAGE = {
    "scale missing": (drop(f"{DOWN}.weight_scale"), f"{DOWN}.weight_scale: is missing; expected BF16 [128, 2]"),
    "shape missing": (drop(f"{DOWN}.weight_shape"), f"{DOWN}.weight_shape: is missing; expected I64 [2]"),
    "codes missing": (drop(f"{DOWN}.weight_packed"), f"{DOWN}.weight_packed: is missing; expected I32 [128, 32]"),
    "scale in F32": (put(f"{Q}.weight_scale", lambda t: t.float()), f"{Q}.weight_scale: is F32, expected BF16"),
    "shape in I32": (put(f"{Q}.weight_shape", lambda t: t.int()), f"{Q}.weight_shape: is I32, expected I64"),
    "codes as bytes": (
        put(f"{Q}.weight_packed", lambda t: t.view(torch.uint8)),
        f"{Q}.weight_packed: is U8, expected I32",
    ),
    "codes halved": (
        put(f"{Q}.weight_packed", lambda t: t[:, :8].clone()),
        f"{Q}.weight_packed: has shape [128, 8], expected [128, 16]",
    ),
    "groups of 64": (
        put(f"{DOWN}.weight_scale", lambda t: t.repeat_interleave(2, dim=1)),
        f"{DOWN}.weight_scale: has shape [128, 4], expected [128, 2]",
    ),
    "wrong shape": (
        put(f"{DOWN}.weight_shape", torch.tensor([256, 128])),
        f"{DOWN}.weight_shape: is [256, 128], expected [128, 256]",
    ),
    "scale NaN": (first_scale(float("nan")), f"{DOWN}.weight_scale: holds 1 group scales that are not finite"),
    "scale Inf": (first_scale(float("inf")), f"{DOWN}.weight_scale: holds 1 group scales that are not finite"),
    "scale zero": (first_scale(0.0), f"{DOWN}.weight_scale: holds 1 group scales that are not finite"),
    "scale negative": (first_scale(-0.5), f"{DOWN}.weight_scale: holds 1 group scales that are not finite"),
    "a global scale": (
        put(f"{DOWN}.weight_global_scale", torch.ones(1)),
        f"{DOWN}.weight_global_scale: is not a tensor of this model",
    ),
    "a zero point": (
        put(f"{DOWN}.weight_zero_point", torch.ones(1)),
        f"{DOWN}.weight_zero_point: is not a tensor of this model",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_directory_is_named(tmp_path, case):
    change, text = DAMAGE[case]
    directory = export_int4(tmp_path / "out")
    edit(directory, change)
    found = issues(directory)
    assert any(issue.startswith(text) for issue in found), found


@pytest.mark.parametrize(
    "entry, value",
    [("num_bits", 8), ("type", "float"), ("strategy", "channel"), ("group_size", 64), ("symmetric", False)],
)
def test_each_entry_of_the_group_is_checked(tmp_path, entry, value):
    directory = export_int4(tmp_path / "out")
    edit_json(
        directory / "config.json",
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update({entry: value}),
    )
    found = issues(directory)
    assert any(f"config_groups weights.{entry} is {value!r}, expected " in issue for issue in found), found


def test_the_format_is_checked(tmp_path):
    directory = export_int4(tmp_path / "out")
    edit_json(directory / "config.json", lambda config: config["quantization_config"].update(format="int-quantized"))
    assert issues(directory) == [
        "config.json: quantization_config.format is 'int-quantized', expected 'pack-quantized'"
    ]
