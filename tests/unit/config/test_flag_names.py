"""Unknown flags name the flag that was meant: a new name, another program's name, a typo."""

import dataclasses
from pathlib import Path

import pytest

from megatron_qad.config.flag_names import REMOVED, RENAMED, advice, most_similar
from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions

FLAGS = [field.name.replace("_", "-") for cls in (MegatronFlags, QADOptions) for field in dataclasses.fields(cls)]
# Flags of Megatron that are more similar to some wrong names than the right ones are.
FLAGS += ["start-eval-at-iter", "microbatch-group-size-per-virtual-pipeline-stage", "batch-size", "log-interval"]
FLAGS += ["expert-tensor-parallel-size", "clip-grad", "seq_length"]


@pytest.mark.parametrize(
    "key, meant",
    [
        ("teacher", "qad-teacher"),
        ("qad-techer", "qad-teacher"),
        ("offload-teacher", "qad-teacher-cpu-offload"),
        ("keep-best", "qad-keep-best"),
        ("qad-polcy", "qad-policy"),
        ("policy", "qad-policy"),
        ("ptq", "qad-ptq"),
        ("qad-lr", "lr"),
        ("qad-micro-batch-size", "micro-batch-size"),
        ("microbatch-size", "micro-batch-size"),
        ("eval-iter", "eval-iters"),
        ("weigth-decay", "weight-decay"),
        ("grad-clip", "clip-grad"),
        ("rule", "qad-policy-override"),
        ("hang-seconds", "qad-hang-timeout"),
        ("qad-hang-second", "qad-hang-timeout"),
        ("learning-rate", "lr"),
        ("epochs", "train-iters"),
        ("gradient-accumulation-steps", "global-batch-size"),
        ("tensor-parallel", "tensor-model-parallel-size"),
        ("zzzzzz", None),
    ],
)
def test_most_similar(key, meant):
    assert most_similar(key, FLAGS) == meant


def test_advice():
    assert advice("qad_hang_seconds", FLAGS, "--") == "its new name is '--qad-hang-timeout'."
    assert advice("qad-rule", FLAGS) == "its new name is 'qad-policy-override'."
    assert advice("Seq-Lenght", ["seq_length"]) == "did you mean 'seq_length'?"
    assert advice("zzzzzz", FLAGS) == ""


def test_removed_flags_are_never_suggested():
    assert "batch-size" in REMOVED and "batch-size" in FLAGS
    assert most_similar("batch-sizes", FLAGS) != "batch-size"


def test_renamed_flags_are_those_of_the_changelog():
    changelog = (Path(__file__).parents[3] / "CHANGELOG.md").read_text()
    for old, new in RENAMED.items():
        (row,) = (line for line in changelog.splitlines() if line.strip().startswith(f"| `--{old}"))
        assert f"`--{new}" in row and new.replace("-", "_") in QADOptions.__dataclass_fields__
