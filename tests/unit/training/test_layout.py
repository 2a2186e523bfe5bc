"""Layouts before anything is built: virtual stages, and what a refusal names."""

from argparse import Namespace

import pytest

from megatron_qad.runtime import QADError, prepare

prepare()
from megatron_qad.training.layout import (  # noqa: E402
    check_layout,
    num_virtual_stages,
    teacher_virtual_stages,
    without_virtual_stages,
)

SHAPE = {
    "hybrid-layer-pattern": "*-*-",
    "num-attention-heads": 4,
    "num-query-groups": 2,
    "kv-channels": 16,
    "ffn-hidden-size": 96,
}


def job(**changes) -> Namespace:
    settings = {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "context_parallel_size": 1,
        "num_virtual_stages_per_pipeline_rank": None,
        "sequence_parallel": False,
        "seq_length": 32,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "rampup_batch_size": None,
        "dataloader_inter_document_masking": False,
        "qad_document_multiple": None,
        "qad_teacher_micro_batch_size": None,
    }
    return Namespace(**(settings | changes))


def refusal(monkeypatch, world: int, shapes=None, **changes) -> str:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(QADError) as error:
        check_layout(job(**changes), shapes or {"the student": SHAPE})
    return str(error.value)


def test_a_refusal_names_layouts_that_would_work(monkeypatch):
    text = refusal(monkeypatch, 2, tensor_model_parallel_size=4)
    assert "the attention heads" not in text and "the key-value heads (2); possible for the student: 1, 2" in text
    assert text.endswith(
        "Layouts that would work on 2 rank(s): TP 1 x PP 1 x CP 1 x DP 2, TP 1 x PP 1 x CP 2 x DP 1, "
        "TP 1 x PP 2 x CP 1 x DP 1, TP 2 x PP 1 x CP 1 x DP 1"
    )


def test_every_layout_that_is_named_works(monkeypatch):
    text = refusal(monkeypatch, 4, tensor_model_parallel_size=4)
    named = text.split("rank(s): ")[1].split(" and ")[0].split(", ")
    assert len(named) > 3
    for layout in named:
        tp, pp, cp, _ = (int(part.split()[1]) for part in layout.split(" x "))
        sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp}
        check_layout(job(**sizes), {"the student": SHAPE})


def test_the_teacher_counts(monkeypatch):
    shapes = {"the student": SHAPE, "the teacher": SHAPE | {"num-query-groups": 1}}
    text = refusal(monkeypatch, 2, shapes, tensor_model_parallel_size=2)
    assert "the key-value heads (1); possible for the teacher: 1." in text and "TP 2" not in text.split("Layouts")[1]


def test_nothing_fits(monkeypatch):
    assert "rank(s): none: change" in refusal(monkeypatch, 1, global_batch_size=7)


def test_the_flag_of_virtual_stages_is_taken_out():
    flag = "--num-virtual-stages-per-pipeline-rank"
    assert without_virtual_stages(["--lr", "1", flag, "2", "--bf16"]) == ["--lr", "1", "--bf16"]
    assert without_virtual_stages([f"{flag}=2", "--bf16"]) == ["--bf16"]


@pytest.mark.parametrize("layers, expected", [(8, 3), (5, 2), (2, 1), (1, 1)])
def test_a_teacher_takes_as_many_virtual_stages_as_it_has_layers_for(layers, expected):
    args = job(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=3)
    args.qad = Namespace(qad_teacher_on_host=False)
    assert num_virtual_stages(args) == 3
    assert teacher_virtual_stages(layers, args) == expected
    args.qad.qad_teacher_on_host = True
    assert teacher_virtual_stages(layers, args) == 1
