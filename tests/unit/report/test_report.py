"""The run report: three runs from one teacher, runs with missing data, and the command line."""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_qad.checkpoint.torch_dist import TorchDistReader
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.models.families import family_of
from megatron_qad.report.report import write_report

LOSS = [(i, 1.0 / i) for i in range(1, 5)]
RATES = [(i, 1e-4) for i in range(1, 5)]


@pytest.fixture
def make_run(tmp_path, teacher, formats, write_events):
    """make_run(name, scalars, loss=...): create a run directory with events, hf/ and qad.json."""

    def make(name, scalars, loss="kl", job_formats=formats):
        directory = tmp_path / name
        write_events(directory / "tensorboard", scalars)
        shutil.copytree(teacher / "hf", directory / "hf")
        job = {"policy": "nvfp4-all-linear", "rules": ["head=bf16"], "loss": loss, "formats": job_formats}
        json_records.write(directory / "qad.json", job)
        return directory

    return make


@pytest.fixture
def three_runs(make_run, evaluations, teacher, save_checkpoint):
    ptq = evaluations({1: (0.5, 2.25, 2.0, 0.75, 20480)}) | {"kl loss": [(1, 0.5)], "learning-rate": [(1, 0.0)]}
    qat = evaluations({2: (0.4, 2.1, 2.0, 0.8, 20480), 4: (0.375, 2.0625, 2.0, 0.8125, 20480)})
    qad = evaluations({2: (0.2, 2.1, 2.0, 0.9, 20480), 4: (0.125, 2.03125, 2.0, 0.9375, 20480)})
    runs = {
        "PTQ": make_run("ptq", ptq),
        "QAT": make_run("qat", qat | {"ce loss": LOSS, "learning-rate": RATES}, loss="ce"),
        "QAD": make_run("qad", qad | {"kl loss": LOSS, "learning-rate": RATES}),
    }
    names = [name for name, fmt in json_records.read(runs["QAD"] / "qad.json")["formats"].items() if fmt == "nvfp4"]
    save_checkpoint(
        runs["QAD"], 4, TorchDistReader(teacher).read(names)
    )  # an untrained student, saved before quantization
    return runs


def row_of(text, name):
    """Return the cells of the first table row of a run."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_report_of_three_runs(three_runs, teacher, tmp_path):
    out = tmp_path / "deep" / "out"
    write_report(three_runs, teacher, out, title="Tiny")
    text = (out / "report.md").read_text()
    assert text.startswith("# Tiny\n")
    assert row_of(text, "PTQ") == ["PTQ", "0.5", "1.000", "2.2500", "2.0000", "75.00%", "20,480", "none"]
    assert row_of(text, "QAT") == ["QAT", "0.375", "0.750", "2.0625", "2.0000", "81.25%", "20,480", "4"]
    assert row_of(text, "QAD") == ["QAD", "0.125", "0.250", "2.0312", "2.0000", "93.75%", "20,480", "4"]
    assert "| QAT | `nvfp4-all-linear` | `head=bf16` | cross entropy | 8 nvfp4 of 9 |" in text
    assert "| PTQ | `nvfp4-all-linear` | `head=bf16` | not trained | 8 nvfp4 of 9 |" in text
    assert "LlamaForCausalLM, 2 blocks, hidden size 64, vocabulary 120" in text
    assert "PTQ: no saved checkpoint" in text and "QAT: no saved checkpoint" in text and "QAD: no" not in text
    assert "different held-out tokens" not in text

    results = json.loads((out / "results.json").read_text())
    assert list(results["runs"]) == ["PTQ", "QAT", "QAD"]
    qad = results["runs"]["QAD"]
    assert qad["validation"]["kl_to_teacher"] == 0.125 and qad["checkpoint_iteration"] == "4"
    assert qad["validation_curves"]["top1_agreement"] == [[2, pytest.approx(0.9)], [4, 0.9375]]
    assert qad["training_loss"]["name"] == "kl loss" and len(qad["training_loss"]["curve"]) == 4
    assert results["runs"]["PTQ"]["training_loss"] is None
    # q 64x64, k and v 32x64, o 64x64; gate, up, down 96x64 each; two norms; embedding, head 120x64, last norm.
    assert results["model"]["num_weights"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64) + 2 * 120 * 64 + 64
    assert len(results["linears"]) == 8
    for linear in results["linears"]:
        # The student is the unquantized teacher, so an export would quantize it to exactly the PTQ weight.
        assert linear["runs"]["QAD"]["distance"] == linear["ptq_error"] > 0
        assert linear["runs"]["QAD"]["input_amax"] is None
    with Image.open(out / "report.png") as image:
        assert image.format == "PNG" and image.width > 1000 and len(image.convert("RGB").getcolors(2**20)) > 50


def test_ten_largest_errors_are_listed_first(three_runs, teacher, tmp_path, formats):
    results = write_report(three_runs, teacher, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `decoder")]
    expected = sorted(results.linears, key=lambda linear: linear.ptq_error, reverse=True)[:10]
    assert listed == [linear.name.removesuffix(".weight") for linear in expected]


def test_missing_data_becomes_notes(make_run, write_events, evaluations, teacher, tmp_path):
    bare = tmp_path / "bare"
    write_events(bare, {"ce loss": LOSS})
    no_teacher = make_run("ce", {"validation/cross_entropy": [(2, 2.5)], "ce loss": LOSS}, loss="ce")
    broken = make_run("nan", evaluations({4: (math.nan, 2.0, 2.0, 0.5, 10)}))
    write_report({"bare": bare, "alone": no_teacher, "nan": broken}, teacher, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "bare: no evaluation is recorded" in text and "bare: no qad.json" in text
    assert row_of(text, "bare")[1:] == [*["not measured"] * 5, "4"]
    assert "alone: evaluated without a teacher" in text
    assert "alone: its last evaluation is at iteration 2, but training continued to iteration 4." in text
    assert row_of(text, "alone")[1:3] == ["not measured", "2.5000"]
    assert "nan: not finite in the last evaluation: kl_to_teacher" in text and row_of(text, "nan")[1] == "nan"
    assert "distances and input amaxes are omitted" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["runs"]["nan"]["validation"]["kl_to_teacher"] is None


def test_evaluation_without_counted_tokens_is_shown(make_run, evaluations, teacher, tmp_path):
    nothing = make_run("nothing", evaluations({4: (math.nan, math.nan, math.nan, math.nan, 0)}))
    some = make_run("some", evaluations({4: (0.5, 2.0, 2.0, 0.5, 10)}))
    write_report({"some": some, "nothing": nothing}, teacher, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert row_of(text, "nothing") == ["nothing", *["no token counted"] * 5, "0", "none"]
    assert "nothing: no token counted in its last evaluation" in text and "not finite" not in text
    assert "different numbers of held-out tokens" not in text
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["runs"]["nothing"]["validation"]["kl_to_teacher"]
        is None
    )


def test_without_job_files_there_are_no_weight_errors(write_events, teacher, tmp_path):
    write_events(tmp_path / "bare", {"ce loss": LOSS})
    results = write_report({"bare": tmp_path / "bare"}, teacher, tmp_path / "out")
    assert (
        results.linears == []
        and "No run has a qad.json with its quantized linears" in (tmp_path / "out/report.md").read_text()
    )


def test_student_of_another_shape_is_not_compared(make_run, evaluations, teacher, tmp_path):
    config = json.loads((teacher / "hf" / "config.json").read_text()) | {"num_hidden_layers": 1}
    formats = {linear.megatron: "nvfp4" for linear in family_of(config).linears(config)}
    run = make_run("small", evaluations({4: (0.5, 2.0, 2.0, 0.5, 10)}), job_formats=formats)
    (run / "hf" / "config.json").write_text(json.dumps(config))
    manifest.write_manifest(run / "hf")
    results = write_report({"small": run}, teacher, tmp_path / "out")
    assert results.linears == [] and any(
        "its linears differ from the teacher's in names or shapes" in note for note in results.notes
    )


def test_differently_smoothed_run_is_not_compared(three_runs, teacher, tmp_path):
    """Its weights differ from the teacher's by smoothing factors, not by quantization errors."""
    record = {"alpha": 0.5, "weights_sha256": "0" * 64}
    json_records.write(three_runs["QAD"] / "qad_smoothing.json", record)
    results = write_report(three_runs, teacher, tmp_path / "out")
    assert any("QAD: its weights are smoothed differently from the teacher's" in note for note in results.notes)
    assert results.linears and not any("QAD" in linear.runs for linear in results.linears)
    json_records.write(teacher / "qad_smoothing.json", record)
    try:
        results = write_report(three_runs, teacher, tmp_path / "again")
    finally:
        (teacher / "qad_smoothing.json").unlink()  # the teacher is shared with other tests
    assert all("QAD" in linear.runs for linear in results.linears)


@pytest.mark.parametrize(
    ("second", "warning"),
    [
        ((0.2, 2.0, 2.001, 0.5, 1024), "teacher's cross entropy differs"),
        ((0.2, 2.0, 2.0, 0.5, 2048), "different numbers of held-out tokens"),
        ((0.2, 2.0, 2.0 + 1e-6, 0.5, 1024), None),
    ],
)
def test_runs_evaluated_on_different_tokens_get_a_note(make_run, evaluations, teacher, tmp_path, second, warning):
    one = make_run("one", evaluations({4: (0.5, 2.0, 2.0, 0.5, 1024)}))
    two = make_run("two", evaluations({4: second}))
    notes = write_report({"one": one, "two": two}, teacher, tmp_path / "out").notes
    warnings = [note for note in notes if "held-out" in note]
    assert warnings == [] if warning is None else warning in warnings[0]


def test_checkpoint_of_another_iteration_gets_a_note(three_runs, teacher, tmp_path):
    (three_runs["QAD"] / "iter_0000004").rename(three_runs["QAD"] / "iter_0000003")
    (three_runs["QAD"] / "latest_checkpointed_iteration.txt").write_text("3")
    notes = write_report(three_runs, teacher, tmp_path / "out").notes
    assert "QAD: its checkpoint is of iteration 3, its last evaluation of 4." in notes


def test_invalid_runs_and_teachers_are_errors(three_runs, teacher, tmp_path):
    with pytest.raises(QADError, match="at least one run"):
        write_report({}, teacher, tmp_path / "out")
    with pytest.raises(QADError, match="no hf/config.json"):
        write_report(three_runs, tmp_path, tmp_path / "out")
    (three_runs["QAD"] / "latest_checkpointed_iteration.txt").write_text("9")
    with pytest.raises(QADError, match="names 9"):
        write_report(three_runs, teacher, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # no partial output


@pytest.fixture
def tool(monkeypatch):
    """tool(*arguments): run tools/report.py in this process."""
    source = Path(__file__).parents[3] / "tools" / "report.py"

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(source), *map(str, arguments)])
        runpy.run_path(str(source), run_name="__main__")

    return call


def test_command_line_writes_the_report(tool, three_runs, teacher, tmp_path, capsys):
    runs = [word for name, directory in three_runs.items() for word in ("--run", f"{name}={directory}")]
    tool(*runs, "--teacher", teacher, "--output", tmp_path / "out", "--title", "By hand")
    assert "note: PTQ: no saved checkpoint" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.md").read_text().startswith("# By hand\n")
    assert (tmp_path / "out" / "report.png").is_file() and (tmp_path / "out" / "results.json").is_file()


def test_damaged_event_file_is_an_error_unless_gaps_are_accepted(tool, three_runs, teacher, tmp_path, capsys):
    (file,) = (three_runs["QAT"] / "tensorboard").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    runs = [word for name, directory in three_runs.items() for word in ("--run", f"{name}={directory}")]
    arguments = [*runs, "--teacher", teacher, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as stopped:
        tool(*arguments)
    assert str(stopped.value).startswith(f"error: {file}: damaged: record ") and not (tmp_path / "out").exists()
    tool(*arguments, "--accept-gaps")
    assert f"note: QAT: {file}: damaged" in capsys.readouterr().out
    assert "The gap was accepted (--accept-gaps)" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["QAD"], "expected NAME=DIR"),
        (["=dir"], "expected NAME=DIR"),
        (["QAD="], "expected NAME=DIR"),
        (["A=x", "A=y"], "given twice"),
        (["A=nowhere"], "nowhere: no such directory"),
    ],
)
def test_command_line_errors_are_one_line(tool, teacher, tmp_path, runs, message):
    with pytest.raises(SystemExit) as stopped:
        tool(*(word for run in runs for word in ("--run", run)), "--teacher", teacher, "--output", tmp_path / "out")
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)
