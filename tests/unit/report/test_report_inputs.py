"""The report's inputs other than runs: exports, evaluation records and sensitivities. Wrong files are refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import EXPORT_FILE
from megatron_qad.evaluation import record
from megatron_qad.report.compared_records import compare_records
from megatron_qad.report.exports import read_export
from megatron_qad.report.sensitivity_file import read_sensitivity

UNIT = {"name": "decoder.layers.0", "format": "nvfp4", "kl": 0.1}


@pytest.fixture
def export(tmp_path):
    """A directory as tools/export_hf.py writes it, with one tensor of 12 bytes."""
    directory = tmp_path / "hf"
    directory.mkdir()
    save_file({"lm_head.weight": torch.zeros(2, 3, dtype=torch.bfloat16)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    json_records.write(
        directory / EXPORT_FILE, {"layout": "modelopt", "checkpoint": "qad", "iteration": "iter_0000120"}
    )
    return directory


def test_export_is_described_by_its_own_files(export):
    found = read_export(export)
    assert (found.layout, found.checkpoint, found.iteration) == ("modelopt", "qad", "120")
    assert found.num_bytes == (export / "model.safetensors").stat().st_size
    assert found.command == ["vllm", "serve", str(export)]


def test_directory_that_is_no_export_is_refused(export):
    json_records.write(export / EXPORT_FILE, {"layout": "modelopt"})
    with pytest.raises(QADError, match=r"is not a record of megatron-qad export"):
        read_export(export)
    (export / EXPORT_FILE).unlink()
    with pytest.raises(QADError, match="Give the --output of a complete"):
        read_export(export)


def test_records_without_a_tokenizer_show_ids(tmp_path, make_evaluation):
    for name, factor in (("PTQ", 2.0), ("QAD", 1.0)):
        (tmp_path / name).mkdir()
        record.save(make_evaluation(name, factor), tmp_path / name)
    notes: list[str] = []
    records = [str(tmp_path / "PTQ"), f"student={tmp_path / 'QAD'}"]
    found = compare_records(records, tmp_path / "none", False, notes)
    assert [evaluation["name"] for evaluation in found["evaluations"]] == ["PTQ", "student"]
    assert len(notes) == 1 and "ids are shown" in notes[0]
    with pytest.raises(QADError, match="none"):  # a tokenizer that the user named
        compare_records(records, tmp_path / "none", True, notes)
    assert compare_records([], tmp_path / "none", True, notes) is None


@pytest.mark.parametrize(
    "document",
    [
        {"num_tokens": 9, "units": [UNIT]},
        {"num_tokens": 9, "everything": {"fp8": 0.1}, "units": [UNIT]},
        {"num_tokens": 9, "everything": {"nvfp4": 0.1}, "units": [UNIT | {"kl": None}]},
    ],
)
def test_file_that_is_no_sensitivity_is_refused(tmp_path, document):
    (tmp_path / "sensitivity.json").write_text(json.dumps(document))
    with pytest.raises(QADError, match=r"is not a result of megatron-qad sensitivity"):
        read_sensitivity(tmp_path)


def test_sensitivity_is_read_from_its_directory_or_file(tmp_path):
    document = {"num_tokens": 9, "everything": {"nvfp4": 0.1}, "units": [UNIT]}
    (tmp_path / "sensitivity.json").write_text(json.dumps(document))
    assert read_sensitivity(tmp_path) == read_sensitivity(tmp_path / "sensitivity.json") == document
