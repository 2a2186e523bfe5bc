"""The commands of docs/quickstart.md, as the page has them, with fewer and smaller steps of training."""

import runpy
from pathlib import Path

import pytest
from shell_commands import commands_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/quickstart.md"
SMALL = "--train-iters 2 --global-batch-size 2 --micro-batch-size 1 --eval-iters 1 --qad-calibration-samples 2"
SMALL += " --lr-warmup-iters 1"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The files of ``make demo`` that the page uses; the model is not trained."""
    directory = tmp_path_factory.mktemp("demo")
    make = runpy.run_path(str(ROOT / "examples/tiny_cpu/make_inputs.py"))
    (directory / "inputs").mkdir()
    make["write_texts"](directory / "inputs")
    make["write_model"](directory / "hf-teacher")
    make["write_tokenizer"](directory / "inputs/raw.txt", directory / "hf-teacher/tokenizer")
    return directory


def test_commands_of_the_quickstart_run(demo, tmp_path, server):
    outputs = {}
    for command in commands_of(PAGE):
        if command.words[0] != "megatron-qad" or not command.is_block:  # in a sentence: of another page
            continue
        argv = [
            word.replace("runs/tiny_cpu", str(demo)).replace("runs/quickstart", str(tmp_path))
            for word in command.words[1:]
        ]
        argv += SMALL.split() if argv[0] in ("train", "ptq") else []
        name = command.words[1] + " --qad-dry-run" * ("--qad-dry-run" in argv)
        outputs[name] = server.run("script_jobs:script", 1, {"path": "megatron_qad/cli/__main__.py", "argv": argv})
    steps = ["import", "prepare", "inspect", "train --qad-dry-run", "ptq", "train", "export", "validate", "report"]
    assert list(outputs) == steps
    for name in ("ptq", "train"):
        assert "megatron_qad validation at iteration" in outputs[name]
    assert "valid; layout modelopt" in outputs["validate"]
    assert (tmp_path / "report/report.html").is_file()
