"""What is cut across ranks equals what is whole: metrics, scales. One launch of 4 ranks for all."""

import pytest

SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def results(server) -> list[dict]:
    return server.results("worker_sharded", 4)


def of(results, what, **wanted):
    return [r for r in results if r["what"] == what and all(r[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_metrics(results, dtype):
    (whole,) = of(results, "metrics", size=1, dtype=dtype)
    for size in SIZES:
        (cut,) = of(results, "metrics", size=size, dtype=dtype)
        assert cut["means"] == pytest.approx(whole["means"], rel=1e-6)
        assert cut["means"]["top1_agreement"] == whole["means"]["top1_agreement"]
        # Tokens 4 and 20 tie in the student; 4 wins. The teacher's best is 4 for one token and 20 for the other.
        assert cut["ties"] == 0.5


def test_a_weights_scale_is_that_of_the_whole_tensor(results):
    found = of(results, "weights")
    assert len(found) == 6  # 3 sizes, cut along rows and columns
    for case in found:
        assert case["equal"]
        assert case["calls"] == ({} if case["size"] == 1 else {"all_reduce": 1})


def test_an_inputs_amax_is_the_largest_of_all_ranks(results):
    for size, expected in ((1, 2.0), (2, 4.0), (4, 6.0)):
        (case,) = of(results, "inputs", size=size, value=-2.0)
        assert case["amax"] == [expected]
        damaged = [case for case in of(results, "inputs", size=size) if "error" in case]
        assert len(damaged) == 1 and "decoder.layers.0.linear" in damaged[0]["error"]
