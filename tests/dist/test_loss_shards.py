"""Every loss over vocabulary cut across 1, 2 and 4 ranks equals float64 autograd over the whole. One launch for all."""

import pytest

TWO_ROUNDS = ("jsd", "two of two rounds")


@pytest.fixture(scope="module")
def results(server) -> list[dict]:
    return server.results("worker_loss_shards", 4)


def of(results, what, **wanted):
    found = [r for r in results if r["what"] == what and all(r[key] == value for key, value in wanted.items())]
    assert found
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(results, size):
    cases = of(results, "loss", size=size)
    assert len(cases) == size * 12 * 2 * 2
    for case in cases:
        # float32 sums, a few operations deep, of logits up to 14 (twice that for teacher_temperature 0.5): 6e-8 of
        # them; five losses' gradients, weighted up to 5, add up.
        tolerance = 2e-5 if case["name"] in ("five", "two of two rounds", "kl, temperatures") else 5e-6
        assert case["loss_error"] <= tolerance, case
        assert case["grad_error"] <= tolerance, case
        assert case["dead"] == 0 and case["finite"], case
    # Between near models the KL is a thousandth of that bound's scale, and so is its error.
    for case in of(results, "loss", name="kl", size=size, closeness=0.01, dtype="torch.float32"):
        assert 1e-6 < case["loss"] / 21 < 1e-4 and case["loss_error"] < 2e-8


def test_some_ranks_hold_only_padding(results):
    columns = {case["rank"]: case["columns"] for case in of(results, "loss", size=4)}
    assert columns == {0: 16, 1: 14, 2: 0, 3: 0}
    assert max(case["grad"] for case in of(results, "loss", size=4, rank=1)) > 0.1


def test_one_collective_forward_and_none_backward(results):
    for case in of(results, "loss"):
        number = 2 if case["name"] in TWO_ROUNDS else 1
        assert case["forward"] == ({} if case["size"] == 1 else {"all_gather_into_tensor": number})
        assert case["backward"] == {}


def test_nothing_counts(results):
    for case in of(results, "nothing"):
        assert case["loss"] == 0 and case["grad"] == 0  # NaN is neither


def test_top_k_of_more_than_a_shard_is_refused(results):
    for case in of(results, "refusals"):
        if case["size"] == 4:
            (text,) = case["texts"]
            assert "topk(k=17): k must not exceed the 16 columns of one rank's shard" in text
        else:
            assert case["texts"] == []


def test_the_fused_output_layer(results):
    for case in of(results, "fused"):
        # float32 logits up to 15; gradients of up to five losses, weighted up to 5, summed over columns or tokens.
        for what in ("loss_error", "hidden_error", "weight_error", "partial_error"):
            assert case[what] <= 2e-6 * max(case["scale"], 15), (what, case)
        gathers = case["chunks"] if case["in_forward"] and case["name"] != "five" else 1
        assert case["chunks"] > 1
        assert case["forward"] == ({} if case["size"] == 1 else {"all_gather_into_tensor": gathers})
        assert case["backward"] == ({} if case["size"] == 1 else {"all_reduce": 1})
