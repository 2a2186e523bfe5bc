"""The steps of examples/tiny_vision, with few pictures and two steps of training."""

import runpy
from pathlib import Path

import pytest
from example_modules import imports_of_examples

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "examples/tiny_vision"
PICTURES, HELDOUT = 12, 5
SMALL = ["--train-iters", "2", "--global-batch-size", "2", "--micro-batch-size", "1", "--qad-calibration-samples", "2"]
SMALL += ["--lr-warmup-iters", "1", "--lr", "1e-3", "--log-interval", "1"]
CONFIG = ["--config", str(ROOT / EXAMPLE / "train.yaml")]


@pytest.fixture(scope="module")
def run(tmp_path_factory, server):
    """The directory of a run with a trained teacher, a student and the records of both, and the output of each step."""
    directory = tmp_path_factory.mktemp("tiny_vision")
    inputs, outputs = directory / "inputs", {}

    def script(name: str, path: str, *argv: str) -> None:
        outputs[name] = server.run("script_jobs:script", 1, {"path": path, "argv": list(map(str, argv))})

    def command(name: str, *argv: str) -> None:
        script(name, "megatron_qad/cli/__main__.py", *argv)

    script("inputs", f"{EXAMPLE}/make_inputs.py", inputs, "--pictures", PICTURES, "--heldout", HELDOUT)
    script("encoder", f"{EXAMPLE}/train_encoder.py", inputs / "hf", "--steps", 2, "--untrained")
    model = ["--tokenizer", inputs / "hf", "--images-for", inputs / "hf"]
    for name, files in {"training": ("questions", "text"), "heldout": ("heldout_words",)}.items():
        chats = [inputs / f"{file}.jsonl" for file in files]
        command(name, "prepare", "--input", *chats, *model, "--output", directory / name)
    command("import", "import", "--hf-model", inputs / "hf", "--output", directory / "untrained")
    data = ["--train-data-path", directory / "training", "--valid-data-path", directory / "heldout", *CONFIG]
    teacher = [*data, "--qad-loss", "ce", "--qad-policy", "bf16", "--qad-student", directory / "untrained", *SMALL]
    command("teacher", "train", *teacher, "--save", directory / "teacher")
    data += ["--qad-teacher", directory / "teacher"]
    student = [*data, "--qad-policy", "nemotron-nano-12b-v2-vl", *SMALL]
    command("student", "train", *student, "--save", directory / "student")
    for name in ("teacher", "student"):
        record = directory / "records" / name
        command(f"evaluate {name}", "evaluate", "--model", directory / name, "--output", record, *data)
    return directory, outputs


@pytest.fixture(scope="module")
def check():
    with imports_of_examples():
        return runpy.run_path(str(ROOT / EXAMPLE / "check.py"))


def test_encoder_and_validations(run):
    _, outputs = run
    assert "largest difference between the trained features and those of VisionEncoder" in outputs["encoder"]
    assert f"{HELDOUT} different images" in outputs["heldout"]
    assert "kl_to_teacher_after_image" in outputs["student"]


def test_records_become_answers(run, check):
    """Each held-out chat is found with its picture and its number of tokens, and the teacher's KL is zero."""
    directory, _ = run
    ids = check["token_ids"](directory / "inputs/hf")
    teacher, student = (check["read_chats"](directory / "records" / name, *ids) for name in ("teacher", "student"))
    assert len(teacher.kl) == 2 * HELDOUT and teacher.has_image.sum() == HELDOUT
    assert (teacher.num_tokens == 2).all()  # one word and the end
    assert teacher.kl.sum() == 0 and student.kl.sum() > 0
    assert (student.has_image == teacher.has_image).all()
    worse = {"teacher": teacher, "ptq": teacher, "qad_images": student}
    assert check["problems"](worse) == ["QAD with images and text has not reduced the KL of PTQ"]


def test_wilson_interval(check):
    """The interval of 8 of 10, from the quadratic equation that Wilson's interval solves."""
    low, high = check["wilson"](8, 10)
    for bound in (low, high):
        assert (0.8 - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / 10)
    assert low < 0.8 < high
