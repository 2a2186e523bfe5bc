"""Layouts before anything is built: virtual stages, and what a refusal names."""

from argparse import Namespace

import pytest

from megatron_qad.engine import QADError, prepare

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
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": None,
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


HYBRID = SHAPE | {
    "hybrid-layer-pattern": "ME*E",
    "mamba-num-heads": 12,
    "mamba-head-dim": 16,
    "mamba-num-groups": 2,
    "num-experts": 12,
    "moe-ffn-hidden-size": 32,
    "moe-shared-expert-intermediate-size": 64,
}


TP, EP, CP, ETP = (f"{x}_parallel_size" for x in ("tensor_model", "expert_model", "context", "expert_tensor"))


@pytest.mark.parametrize(
    ("world", "changes", "says"),
    [
        (3, {TP: 3}, "3 does not divide the attention heads (4); possible for the student: 1, 2"),
        (4, {TP: 4}, "4 does not divide the key-value heads (2)"),
        (5, {EP: 5}, "5 does not divide the experts of the student (12); possible: 1, 2, 3, 4, 6"),
        (2, {TP: 2}, "--tensor-model-parallel-size 2 with experts (the student) needs --sequence-parallel"),
        (2, {ETP: 4}, "the experts' tensor parallelism of 4 does not divide the 16-element blocks of an expert"),
        (2, {EP: 4}, "experts at EP 4 x expert TP 1 x PP 1 need a multiple of 4 ranks"),
        (5, {CP: 5}, "--context-parallel-size 5 does not divide the 12 Mamba heads and 2 groups"),
    ],
)
def test_layouts_of_hybrids_that_cannot_be(monkeypatch, world, changes, says):
    assert says in refusal(monkeypatch, world, {"the student": HYBRID}, **changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mamba-num-groups": 1}, "--tensor-model-parallel-size 2 does not divide the Mamba groups (1)"),
        ({"mamba-num-heads": 13}, "--tensor-model-parallel-size 2 does not divide the Mamba heads (13)"),
        ({"moe-shared-expert-intermediate-size": 48}, "does not divide the 16-element blocks of the shared expert (3)"),
    ],
)
def test_tensor_parallelism_divides_mamba_and_shared_experts(monkeypatch, change, says):
    text = refusal(monkeypatch, 2, {"the student": HYBRID | change}, **{TP: 2}, sequence_parallel=True)
    assert says in text and "possible for the student: 1" in text


def test_expert_parallelism_without_experts(monkeypatch):
    text = refusal(monkeypatch, 2, expert_model_parallel_size=2)
    assert "--expert-model-parallel-size 2, but the student has no experts" in text


def test_a_hybrid_layout_that_works(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}
    check_layout(job(**sizes), {"the student": HYBRID})
