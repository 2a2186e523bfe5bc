"""The local spec's core attention has the values and gradients of Megatron's and does not store the scores.

Covers grouped queries, a custom scale, packed documents, and context parallelism of 1, 2 and 4.
"""

import pytest

# float64: sums are in another order. Megatron's softmax uses float32 only on request.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def results(server):
    return server.results("worker_attention", 4)


def test_equals_megatron(results):
    assert len(results) == 15
    for result in results:
        assert result["error"] <= TOLERANCE, result


def test_scores_are_not_stored(results):
    """The scores of a row would be length / head dim = 4 or 8 times as large as its queries."""
    for result in results:
        assert result["kept"] <= 1, result
