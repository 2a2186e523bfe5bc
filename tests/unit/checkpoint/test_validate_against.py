"""``validate --against``: which models are accepted, and what is compared besides weights (dist/test_mutations.py)."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megatron_qad.checkpoint.hf_writer import write_hf_checkpoint
from megatron_qad.checkpoint.layouts import HFTensor
from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records

sys.path.insert(0, str(Path(__file__).parent))
from exported import CONFIG, DOWN, FAMILIES, RECORD, export, items  # noqa: E402  (a helper module in this directory)


def original(directory: Path, config=CONFIG, **changes) -> Path:
    """Write the model from which ``export`` was quantized; its linears are equal to the exported ones."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | changes))
    save_file({item.name: item.tensor for item in items(config)}, directory / "model.safetensors")
    return directory


def issues(directory, against, **arguments):
    return [str(issue) for issue in validate_nvfp4(directory, against=against, **arguments).issues]


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_good_exports_have_no_issue(tmp_path, family, layout):
    config = FAMILIES[family]
    hf = original(tmp_path / "hf", config)
    result = validate_nvfp4(export(tmp_path / "out", layout, config), against=hf)
    assert not result.issues, result.issues
    assert result.notes == [
        "the scales of inputs were not checked: there is no calibration.json",
        f"the tokenizer was not compared: {hf} has none",
    ]


def test_tensors_of_another_shape_are_reported(tmp_path):
    hf = original(tmp_path / "hf", {**CONFIG, "intermediate_size": 64})
    reported = issues(export(tmp_path / "out", "modelopt"), hf)
    assert f"config.json: intermediate_size is 48, but 64 in {hf}" in reported
    assert f"{DOWN}.weight: has shape [32, 48], but [32, 64] in {hf}" in reported


def test_zero_weights_are_allowed_if_they_are_zero_in_the_original(tmp_path):
    stream = [HFTensor(i.name, i.tensor * 0, *(getattr(i, k) for k in ("module", "fmt", "weight_scale", "input_scale")))
              if i.module == DOWN or "layers.1.input_layernorm" in i.name else i for i in items()]  # fmt: skip
    hf = original(tmp_path / "hf")
    save_file({item.name: item.tensor for item in stream}, hf / "model.safetensors")
    modules = [item.module for item in stream if item.module]
    arguments = {"config": CONFIG, "layout": "modelopt", "linear_modules": modules, "record": RECORD}
    write_hf_checkpoint(stream, tmp_path / "out", **arguments)
    assert issues(tmp_path / "out", hf) == []
    zeros = [issue for issue in issues(tmp_path / "out", None) if "is all zeros; if the original is as well" in issue]
    assert sorted(issue.split(":")[0] for issue in zeros) == [f"{DOWN[:14]}.input_layernorm.weight", f"{DOWN}.weight"]


def test_models_that_training_did_not_begin_from_are_refused(tmp_path):
    plain, smoothed = original(tmp_path / "hf"), original(tmp_path / "smoothed")
    json_records.write(smoothed / "qad_export.json", {"smoothing": "abc"})
    from_smoothed = export(tmp_path / "out", "modelopt", record=RECORD | {"smoothing": "abc"})
    assert issues(from_smoothed, smoothed) == []
    with pytest.raises(QADError, match="--against .*hf: training began from smoothed weights .* --layout bf16"):
        issues(from_smoothed, plain)
    from_plain = export(tmp_path / "out2", "modelopt")
    with pytest.raises(QADError, match="--against .*smoothed: training began from weights that were not smoothed"):
        issues(from_plain, smoothed)
    with pytest.raises(QADError, match=r"is quantized \(.*Give the BF16 model that it was made from"):
        issues(from_plain, from_smoothed)
    with pytest.raises(QADError, match="no config.json"):
        issues(from_plain, tmp_path / "nowhere")


def test_recorded_movement_decides_how_far_norms_may_be(tmp_path):
    hf = original(tmp_path / "hf")
    tensors = {item.name: item.tensor.clone() for item in items()}
    tensors["model.norm.weight"] += 0.01  # a fifth of its size
    save_file(tensors, hf / "model.safetensors")
    ptq, qad, unknown = (
        export(tmp_path / str(movement), "modelopt", record=RECORD | {"max_movement": movement})
        for movement in (0.0, 0.015, None)
    )
    (issue,) = issues(ptq, hf)
    assert issue.startswith("model.norm.weight: has a relative error of 0.187")
    assert issues(qad, hf) == issues(unknown, hf) == []


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_calibration_record(tmp_path, layout):
    inputs = {item.module: 1.0 + len(item.module) for item in items() if item.fmt == "nvfp4"}
    record = {"inputs": inputs, "keys": {}, "values": {}}
    directory = export(tmp_path / "out", layout, calibration=record)
    reported = [str(issue) for issue in validate_nvfp4(directory).issues]
    assert len(reported) == 14  # exported.py chooses its input scales in another way
    assert f"which calibration.json implies: the calibration's amax is {inputs[DOWN]!r}" in "\n".join(reported)
    json_records.write(directory / "calibration.json", record | {"inputs": {}})
    reported = [str(issue) for issue in validate_nvfp4(directory, with_sums=False).issues]
    assert any(f"calibration.json: has no amax of {DOWN} (inputs)" in issue for issue in reported)
    for content in ({"inputs": {DOWN: "1"}}, [], None):
        json_records.write(directory / "calibration.json", content)
        (issue,) = validate_nvfp4(directory, with_sums=False).issues
        assert str(issue) == "calibration.json: has no 'inputs' with the amax of each linear. Export again."
    (directory / "calibration.json").write_text("{")
    (issue,) = validate_nvfp4(directory, with_sums=False).issues
    assert str(issue).startswith("calibration.json: is damaged")
