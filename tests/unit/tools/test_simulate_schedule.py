"""The schedule simulator against what is known in closed form; tests/dist compares it with a measured run."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from simulate_schedule import WAYS, Costs, bound, draw, simulate, student_order  # noqa: E402

ALONE = Costs(forward=1, backward=2, teacher=0)


@pytest.mark.parametrize("ranks, microbatches", [(1, 3), (2, 4), (4, 4), (4, 16), (8, 9)])
def test_1f1b(ranks, microbatches):
    """(m + p - 1) (f + b); the first rank keeps p microbatches; the idle share is (p - 1) / (m + p - 1)."""
    timeline = simulate("first", ranks, 1, microbatches, ALONE)
    assert timeline.time == (microbatches + ranks - 1) * 3
    assert timeline.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert timeline.peak_kept() == min(ranks, microbatches)


@pytest.mark.parametrize("ranks, chunks, microbatches", [(2, 2, 4), (4, 2, 8), (4, 3, 16)])
def test_interleaving_divides_the_bubble(ranks, chunks, microbatches):
    timeline = simulate("first", ranks, chunks, microbatches, ALONE)
    assert timeline.time == pytest.approx(microbatches * 3 + (ranks - 1) * 3 / chunks)


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_teacher(chunks):
    """Without a barrier the student's ramp follows the teacher's; inside, both ramps count."""
    ranks, microbatches = 4, 8
    first, inside, filled = (simulate(way, ranks, chunks, microbatches, Costs()).time for way in WAYS)
    assert first == pytest.approx(microbatches + microbatches * 3 + (ranks - 1) * 3 / chunks)
    assert inside == pytest.approx((microbatches + (ranks - 1) / chunks) * 4)
    assert bound(ranks, chunks, microbatches, Costs()) <= filled < first < inside


def test_p2p_is_waited_for_between_ranks_only():
    assert simulate("first", 1, 1, 4, Costs(p2p=5)).time == simulate("first", 1, 1, 4, Costs()).time
    # One microbatch on two ranks: teacher and student forward, one transfer each, overlap; then backward, another one.
    assert simulate("first", 2, 1, 1, Costs(1, 2, 0, p2p=0.5)).time == 2 * 3 + 2 * 0.5


def test_every_pass_runs_once_and_in_the_order_of_its_needs():
    for rank in range(4):
        order = student_order(rank, 4, 2, 8)
        assert len(order) == len(set(order)) == 2 * 8 * 2
        for op in order:
            if op.kind == "B":
                assert order.index(type(op)("F", op.microbatch, op.stage)) < order.index(op)


def test_virtual_stages_need_whole_rounds():
    with pytest.raises(ValueError, match="no multiple of 4"):
        simulate("first", 4, 2, 6, Costs())


def test_the_picture(tmp_path):
    draw({way: simulate(way, 4, 1, 8, Costs()) for way in WAYS}, tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes()[:4] == b"\x89PNG"
