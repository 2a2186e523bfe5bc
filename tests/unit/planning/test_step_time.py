"""Estimated times: operations over the stated rate, and what parallelism adds."""

from dataclasses import replace

import pytest
from tiny_configs import TINY_LLAMA

from megatron_qad.models.families import family_of
from megatron_qad.models.flops import forward_flops
from megatron_qad.planning.activations import TE
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout
from megatron_qad.planning.memory import PlannedJob
from megatron_qad.planning.step_time import Machine, StepTimes

MODEL = PlannedModel(family_of(TINY_LLAMA), TINY_LLAMA)
JOB = PlannedJob(student=MODEL, teacher=MODEL, kernels=TE)
MACHINE = Machine(peak=1e12, mfu=0.5)
LAYOUT = Layout(seq_length=128, global_batch_size=8)


def test_one_rank_only_computes():
    """Three passes of the student and one of the teacher at half of the peak."""
    times = StepTimes(JOB, MACHINE)
    forward = forward_flops(MODEL.family, MODEL.hf).of([128] * 8)
    assert times.flops(LAYOUT) == 4 * forward
    time = times.of(LAYOUT)
    assert (time.student, time.teacher) == pytest.approx((3 * forward / 5e11, forward / 5e11))
    assert time.total == pytest.approx(time.student + time.teacher)


def test_recomputation_repeats_the_layers():
    times = StepTimes(JOB, MACHINE)
    head = 2 * 64 * 101 * 8 * 128
    more = times.of(replace(LAYOUT, recompute="full")).student - times.of(LAYOUT).student
    assert more == pytest.approx((forward_flops(MODEL.family, MODEL.hf).of([128] * 8) - head) / 5e11)


def test_bubble_shrinks_with_microbatches_and_virtual_stages():
    times = StepTimes(JOB, MACHINE)
    few, many = (times.of(Layout(pp=2, seq_length=128, global_batch_size=n)) for n in (4, 64))
    assert few.bubble / few.student > many.bubble / many.student > 0
    assert times.of(Layout(pp=2, vpp=2, seq_length=128, global_batch_size=4)).bubble < few.bubble


@pytest.mark.parametrize(
    "sizes, phase",
    [
        ({"tp": 2, "sequence_parallel": True}, "tensor_traffic"),
        ({"cp": 2}, "tensor_traffic"),
        ({"pp": 2}, "pipeline_traffic"),
        ({"dp": 2}, "data_traffic"),
    ],
)
def test_parallelism_has_its_traffic(sizes, phase):
    time = StepTimes(JOB, MACHINE).of(replace(LAYOUT, **sizes))
    assert getattr(time, phase) > 0
    slow = StepTimes(JOB, replace(MACHINE, node_bandwidth=MACHINE.node_bandwidth / 2)).of(replace(LAYOUT, **sizes))
    assert getattr(slow, phase) == pytest.approx(2 * getattr(time, phase))


def test_offloaded_teacher_waits_for_its_copies():
    job = replace(JOB, offloads_teacher=True)
    slow = replace(MACHINE, host_bandwidth=1.0)
    assert StepTimes(job, slow).of(LAYOUT).host_traffic > 1e5 * StepTimes(job, MACHINE).of(LAYOUT).host_traffic
