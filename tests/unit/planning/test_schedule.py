"""The order of passes on a pipeline rank, and the largest number of microbatches that it holds."""

import itertools

import pytest

from megatron_qad.planning.layout import Layout
from megatron_qad.planning.schedule import passes


def held(layout: Layout, rank: int) -> list[int]:
    """Return how many microbatches a rank holds after each pass, over all its model chunks."""
    return list(itertools.accumulate(1 if is_forward else -1 for is_forward, _ in passes(layout, rank)))


@pytest.mark.parametrize("rank, expected", [(0, 4), (1, 3), (2, 2), (3, 1)])
def test_rank_holds_a_microbatch_for_each_later_stage(rank, expected):
    counts = held(Layout(pp=4, global_batch_size=8), rank)
    assert max(counts) == expected and counts[-1] == 0 and len(counts) == 16


def test_few_microbatches_limit_what_a_rank_holds():
    assert max(held(Layout(pp=4, global_batch_size=2), 0)) == 2


@pytest.mark.parametrize("rank, expected", [(0, 11), (1, 9), (2, 7), (3, 5)])
def test_virtual_stages_hold_more(rank, expected):
    """Two chunks on four ranks: a rank starts with 2 (4 - rank - 1) + 4 warmup passes and one more forward pass."""
    layout = Layout(pp=4, vpp=2, global_batch_size=8)
    assert max(held(layout, rank)) == expected


def test_each_microbatch_passes_each_chunk_forward_before_backward():
    for rank in range(2):
        balance = {0: 0, 1: 0}
        for is_forward, chunk in passes(Layout(pp=2, vpp=2, global_batch_size=6), rank):
            balance[chunk] += 1 if is_forward else -1
            assert balance[chunk] >= 0
        assert balance == {0: 0, 1: 0}
