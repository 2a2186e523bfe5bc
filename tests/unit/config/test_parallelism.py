"""Checks of the parallelism, and the parallelism that their errors suggest."""

import dataclasses

import pytest

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.parallelism import check_parallelism, teacher_virtual_stages
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.config.yaml_file import remove_flags
from megatron_qad.engine import QADError

SHAPE = {
    "hybrid-layer-pattern": "*-*-",
    "num-attention-heads": 4,
    "num-query-groups": 2,
    "kv-channels": 16,
    "ffn-hidden-size": 96,
}


def job(**changes) -> tuple[MegatronFlags, QADOptions]:
    sizes = {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 8} | changes
    names = {field.name for field in dataclasses.fields(MegatronFlags)}
    flags = {name: value for name, value in sizes.items() if name in names}
    return MegatronFlags(**flags), QADOptions(**{name: sizes[name] for name in sizes.keys() - names})


def error_text(world: int, shapes=None, **changes) -> str:
    with pytest.raises(QADError) as error:
        check_parallelism(*job(**changes), shapes or {"the student": SHAPE}, world)
    return str(error.value)


def test_error_lists_parallelism_that_would_work():
    text = error_text(2, tensor_model_parallel_size=4)
    assert "the attention heads" not in text and "the key-value heads (2); possible for the student: 1, 2" in text
    assert text.endswith(
        "Parallelism that would work on 2 ranks: TP 1 x PP 1 x CP 1 x DP 2, TP 1 x PP 1 x CP 2 x DP 1, "
        "TP 1 x PP 2 x CP 1 x DP 1, TP 2 x PP 1 x CP 1 x DP 1."
    )


def test_all_listed_parallelism_works():
    text = error_text(4, tensor_model_parallel_size=4)
    listed = text.split("4 ranks: ")[1].removesuffix(".").split(" and ")[0].split(", ")
    assert len(listed) > 3
    for parallelism in listed:
        tp, pp, cp, _ = (int(part.split()[1]) for part in parallelism.split(" x "))
        sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp}
        check_parallelism(*job(**sizes), {"the student": SHAPE}, 4)


def test_parallelism_must_fit_the_teacher():
    shapes = {"the student": SHAPE, "the teacher": SHAPE | {"num-query-groups": 1}}
    text = error_text(2, shapes, tensor_model_parallel_size=2)
    assert (
        "the key-value heads (1); possible for the teacher: 1." in text and "TP 2" not in text.split("Parallelism")[1]
    )


def test_no_parallelism_fits():
    assert "1 rank: none: change" in error_text(1, global_batch_size=7)


def test_remove_flags():
    flag = "--num-virtual-stages-per-pipeline-rank"
    assert remove_flags(["--lr", "1", flag, "2", "--bf16"], flag) == ["--lr", "1", "--bf16"]
    assert remove_flags([f"{flag}=2", "--bf16"], flag) == ["--bf16"]


@pytest.mark.parametrize("layers, expected", [(8, 3), (5, 2), (2, 1), (1, 1)])
def test_teacher_with_few_layers_gets_fewer_virtual_stages(layers, expected):
    sizes = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3}
    flags, options = job(**sizes)
    assert flags.num_virtual_stages == 3
    assert teacher_virtual_stages(layers, flags, options) == expected
    assert teacher_virtual_stages(layers, *job(**sizes, qad_teacher_cpu_offload=True)) == 1


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
    ("world", "changes", "message"),
    [
        (3, {TP: 3}, "3 does not divide the attention heads (4); possible for the student: 1, 2"),
        (4, {TP: 4}, "4 does not divide the key-value heads (2)"),
        (5, {EP: 5}, "5 does not divide the experts of the student (12); possible: 1, 2, 3, 4, 6"),
        (2, {TP: 2}, "--tensor-model-parallel-size 2 with experts (the student) needs --sequence-parallel"),
        (2, {ETP: 4}, "the expert tensor-parallel size 4 does not divide the 16-element blocks of an expert"),
        (2, {EP: 4}, "experts at EP 4 x expert TP 1 x PP 1 need a multiple of 4 ranks"),
        (5, {CP: 5}, "--context-parallel-size 5 does not divide the 12 Mamba heads and 2 groups"),
    ],
)
def test_impossible_parallelism_of_hybrids(world, changes, message):
    assert message in error_text(world, {"the student": HYBRID}, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mamba-num-groups": 1}, "--tensor-model-parallel-size 2 does not divide the Mamba groups (1)"),
        ({"mamba-num-heads": 13}, "--tensor-model-parallel-size 2 does not divide the Mamba heads (13)"),
        ({"moe-shared-expert-intermediate-size": 48}, "does not divide the 16-element blocks of the shared expert (3)"),
    ],
)
def test_tensor_parallelism_divides_mamba_and_shared_experts(change, message):
    text = error_text(2, {"the student": HYBRID | change}, **{TP: 2}, sequence_parallel=True)
    assert message in text and "possible for the student: 1" in text


def test_expert_parallelism_without_experts_is_rejected():
    text = error_text(2, expert_model_parallel_size=2)
    assert "--expert-model-parallel-size 2, but the student has no experts" in text


def test_possible_parallelism_of_a_hybrid():
    sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}
    check_parallelism(*job(**sizes), {"the student": HYBRID}, 4)


TWELVE_HEADS = {
    "hybrid-layer-pattern": "*-",
    "num-attention-heads": 12,
    "num-query-groups": 4,
    "kv-channels": 16,
    "ffn-hidden-size": 128,
}


@pytest.mark.parametrize(
    "change, tp, message",
    [
        ({}, 5, "does not divide the attention heads (12); possible for the student: 1, 2, 4."),
        ({}, 3, "does not divide the key-value heads (4); possible for the student: 1, 2, 4."),
        ({"kv-channels": 4}, 2, "does not divide the 16-element blocks of the attention output (3)"),
        ({"ffn-hidden-size": 224}, 4, "the 16-element blocks of the MLP (14); possible for the student: 1, 2."),
        (
            {"num-attention-heads": 9, "num-query-groups": 3, "ffn-hidden-size": 1536},
            2,
            "possible for the student: 1, 3.",
        ),
    ],
)
def test_tensor_parallel_sizes_that_do_not_divide_the_model(change, tp, message):
    text = error_text(tp, {"the student": TWELVE_HEADS | change}, tensor_model_parallel_size=tp)
    assert text.startswith(f"--tensor-model-parallel-size {tp} ") and message in text


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tensor_parallel_sizes_that_divide_the_model(tp):
    check_parallelism(*job(tensor_model_parallel_size=tp), {"the student": TWELVE_HEADS}, tp)
