"""The local spec's core attention equals Megatron's, values and gradients: grouped queries, a scale of its own,
documents kept apart, context parallelism of 1, 2 and 4, and keeps no scores."""

import pytest

# float64: sums in another order, and Megatron's softmax, which goes through float32 only where asked to.
TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def results(server):
    return server.results("worker_attention", 4)


def test_equals_megatrons(results):
    assert len(results) == 15
    for result in results:
        assert result["error"] <= TOLERANCE, result


def test_keeps_no_scores(results):
    """All scores of a row would be length / head dim = 4 or 8 times as large as its queries."""
    for result in results:
        assert result["kept"] <= 1, result
