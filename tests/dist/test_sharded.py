"""Metrics, weight scales and amaxes of sharded tensors equal those of whole tensors. One launch of 4 ranks for all."""

import pytest

SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def results(server) -> list[dict]:
    return server.results("worker_sharded", 4)


def select(results, what, **values):
    return [r for r in results if r["what"] == what and all(r[key] == value for key, value in values.items())]


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_sharded_metrics_equal_whole(results, dtype):
    (whole,) = select(results, "metrics", size=1, dtype=dtype)
    for size in SIZES:
        (sharded,) = select(results, "metrics", size=size, dtype=dtype)
        assert sharded["means"] == pytest.approx(whole["means"], rel=1e-6)
        assert sharded["means"]["top1_agreement"] == whole["means"]["top1_agreement"]
        # Tokens 4 and 20 tie in the student and 4 is chosen. The teacher's best is 4 for one token, 20 for the other.
        assert sharded["ties"] == 0.5


def test_sharded_weights_have_the_scale_of_the_whole_tensor(results):
    cases = select(results, "weights")
    assert len(cases) == 6  # 3 sizes, sharded along rows and columns
    for case in cases:
        assert case["equal"]
        assert case["calls"] == ({} if case["size"] == 1 else {"all_reduce": 1})


def test_amax_of_an_input_is_the_maximum_over_ranks(results):
    for size, expected in ((1, 2.0), (2, 4.0), (4, 6.0)):
        (case,) = select(results, "inputs", size=size, value=-2.0)
        assert case["amax"] == [expected]
        damaged = [case for case in select(results, "inputs", size=size) if "error" in case]
        assert len(damaged) == 1 and "decoder.layers.0.linear" in damaged[0]["error"]


def test_headroom_is_that_of_one_rank(results):
    """The ranks' rows differ by up to 1000, so the largest result of the ranks would be another one."""
    amaxes = [case["amax"] for size in SIZES for case in select(results, "headroom", size=size)]
    assert len(amaxes) == 2 * len(SIZES)  # sharded along rows and columns
    assert amaxes[0][0] > 1000 and all(amax == amaxes[0] for amax in amaxes)
