"""Comparison of evaluations, their records on disk, and the command line."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records
from megatron_qad.evaluation import record
from megatron_qad.evaluation.comparison import compare, worst_tokens
from megatron_qad.evaluation.comparison_tables import markdown


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[3] / "tools"), *sys.path])
    return importlib.import_module("compare_evaluations")


def test_differences_are_paired(make_evaluation):
    result = compare([make_evaluation("PTQ"), make_evaluation("QAD", 0.5)])
    ptq, qad = result["evaluations"]
    assert "differences" not in ptq and qad["kl_ratio"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert qad["differences"]["cross_entropy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    means = ptq["means"]["kl_to_teacher"]
    assert means["low"] < means["value"] < means["high"]
    assert qad["differences"]["kl_to_teacher"]["value"] == pytest.approx(-0.5 * means["value"])
    base = compare([make_evaluation("PTQ"), make_evaluation("QAD", 0.5)], baseline="QAD")
    assert base["evaluations"][0]["kl_ratio"]["value"] == pytest.approx(2.0)


def test_groups_and_percentiles(make_evaluation):
    evaluation = make_evaluation("PTQ")
    (result,) = compare([evaluation])["evaluations"]
    kl, position = (evaluation.tokens[name] for name in ("kl_to_teacher", "position"))
    assert list(result["kl_by_position"]) == ["0", "1", "2-3", "4-7", "8-15"]
    assert result["kl_by_position"]["4-7"] == pytest.approx(kl[(position >= 4) & (position < 8)].mean())
    assert result["kl_percentiles"] == pytest.approx(
        {"50": np.median(kl), "90": np.percentile(kl, 90), "99": np.percentile(kl, 99)}
        | {"99.9": np.percentile(kl, 99.9), "max": kl.max()}
    )


def test_worst_tokens_have_their_context(make_evaluation):
    evaluation = make_evaluation("PTQ")
    (worst,) = worst_tokens(evaluation, None, 1)
    i = int(evaluation.tokens["kl_to_teacher"].argmax())
    row, column = (int(evaluation.tokens[name][i]) for name in ("row", "column"))
    assert worst["context"] == " ".join(map(str, evaluation.rows[row, : column + 1]))
    assert worst["token"] == str(evaluation.tokens["label"][i])
    assert worst["student"] == str(evaluation.tokens["student_top"][i])


def test_other_tokens_teachers_and_names_are_refused(make_evaluation):
    first = make_evaluation("PTQ")
    with pytest.raises(QADError, match="two evaluations are called 'PTQ'"):
        compare([first, make_evaluation("PTQ")])
    with pytest.raises(QADError, match="other tokens than PTQ: tokens_sha256 is text1, expected text0"):
        compare([first, make_evaluation("QAD", seed=1)])
    other = make_evaluation("QAD")
    other = replace(other, tokens=other.tokens | {"teacher_top": other.tokens["student_top"]})
    with pytest.raises(QADError, match="another teacher than PTQ: their most likely tokens differ for 9"):
        compare([first, other])
    with pytest.raises(QADError, match="--baseline QAT: is not one of PTQ"):
        compare([first], baseline="QAT")


def test_other_rounding_errors_are_noted(make_evaluation):
    first, other = make_evaluation("PTQ"), make_evaluation("QAD")
    assert compare([first, other])["notes"] == []
    entropy = np.nextafter(other.tokens["teacher_entropy"], np.float32(9))
    comparison = compare([first, replace(other, tokens=other.tokens | {"teacher_entropy": entropy})])
    (note,) = comparison["notes"]
    assert note.startswith("QAD and PTQ were evaluated with other rounding errors")
    assert note in markdown(comparison)


def test_records_return_what_was_saved(make_evaluation, tmp_path):
    evaluation, directory = make_evaluation("PTQ"), tmp_path / "new" / "record"
    record.check_output(directory)
    record.save(evaluation, directory)
    record.save(evaluation, directory)  # replaces it
    loaded = record.load(directory)
    assert loaded.about == evaluation.about | {"tokens_file_sha256": loaded.about["tokens_file_sha256"]}
    assert np.array_equal(loaded.rows, evaluation.rows) and loaded.tokens.keys() == evaluation.tokens.keys()
    for name, values in evaluation.tokens.items():
        assert loaded.tokens[name].dtype == values.dtype and np.array_equal(loaded.tokens[name], values)
    record.check_output(directory)


def test_damaged_records_are_refused(make_evaluation, tmp_path):
    record.check_output(tmp_path)
    record.save(make_evaluation("PTQ"), tmp_path)
    content = (tmp_path / "tokens.npz").read_bytes()
    (tmp_path / "tokens.npz").write_bytes(content[:-1])
    with pytest.raises(QADError, match="tokens.npz: has changed since it was written. Evaluate PTQ again"):
        record.load(tmp_path)
    (tmp_path / "tokens.npz").unlink()
    with pytest.raises(QADError, match="tokens.npz: is missing"):
        record.load(tmp_path)
    json_records.write(tmp_path / "evaluation.json", {"name": "PTQ"})
    with pytest.raises(QADError, match="not a record of megatron-qad evaluate"):
        record.load(tmp_path)
    (tmp_path / "other").touch()
    with pytest.raises(QADError, match="holds other, which is not of an evaluation"):
        record.check_output(tmp_path)


def test_command_line(make_evaluation, tool, tmp_path, capsys):
    for name, factor in (("ptq", 1.0), ("qad", 0.5)):
        record.check_output(tmp_path / name)
        record.save(make_evaluation(name, factor), tmp_path / name)
    tool.main([str(tmp_path / "ptq"), f"QAD={tmp_path}/qad", "--output", str(tmp_path / "out"), "--num-worst", "2"])
    text = capsys.readouterr().out
    assert text == (tmp_path / "out" / "comparison.md").read_text()
    assert "| QAD | " in text and "| KL / ptq's |" in text and "0.500 [0.500, 0.500]" in text
    result = json_records.read(tmp_path / "out" / "comparison.json")
    assert text == markdown(result) and json.dumps(result)
    assert [len(e["worst"]) for e in result["evaluations"]] == [2, 2]
    with pytest.raises(QADError, match="no evaluation.json"):
        tool.main([f"QAD={tmp_path}/none"])
    with pytest.raises(QADError, match="--num-samples 0"):
        tool.main([str(tmp_path / "ptq"), "--num-samples", "0"])
