"""Every loss on a vocabulary sharded over 1, 2 and 4 ranks equals float64 autograd without shards."""

import pytest

TWO_ROUNDS = ("jsd", "two of two rounds")


@pytest.fixture(scope="module")
def results(server) -> list[dict]:
    return server.results("worker_loss_shards", 4)


def select(results, what, **fields):
    selected = [r for r in results if r["what"] == what and all(r[key] == value for key, value in fields.items())]
    assert selected
    return selected


@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_and_gradients_equal_full_vocabulary(results, size):
    cases = select(results, "loss", size=size)
    assert len(cases) == size * 12 * 2 * 2
    for case in cases:
        # A few float32 roundings (6e-8) of logits up to 14 (twice that for teacher_temperature 0.5). The gradients of
        # five losses with weights up to 5 are summed.
        tolerance = 2e-5 if case["name"] in ("five", "two of two rounds", "kl, temperatures") else 5e-6
        assert case["loss_error"] <= tolerance, case
        assert case["grad_error"] <= tolerance, case
        assert case["dead"] == 0 and case["finite"], case
    # For similar models the KL is a thousand times smaller than this bound assumes, and so is its error.
    for case in select(results, "loss", name="kl", size=size, closeness=0.01, dtype="torch.float32"):
        assert 1e-6 < case["loss"] / 21 < 1e-4 and case["loss_error"] < 2e-8


def test_ranks_with_only_padding(results):
    columns = {case["rank"]: case["columns"] for case in select(results, "loss", size=4)}
    assert columns == {0: 16, 1: 14, 2: 0, 3: 0}
    assert max(case["grad"] for case in select(results, "loss", size=4, rank=1)) > 0.1


def test_number_of_collectives(results):
    for case in select(results, "loss"):
        num_gathers = 2 if case["name"] in TWO_ROUNDS else 1
        assert case["forward"] == ({} if case["size"] == 1 else {"all_gather_into_tensor": num_gathers})
        assert case["backward"] == {}


def test_all_tokens_masked(results):
    for case in select(results, "nothing"):
        assert case["loss"] == 0 and case["grad"] == 0  # NaN would not equal 0


def test_top_k_larger_than_a_shard_raises(results):
    for case in select(results, "refusals"):
        if case["size"] == 4:
            (text,) = case["texts"]
            assert "topk(k=17): k must not exceed the 16 columns of one rank's shard" in text
        else:
            assert case["texts"] == []


def test_fused_output_layer(results):
    for case in select(results, "fused"):
        # float32 logits up to 15. Gradients of up to five losses, weighted up to 5, are summed over columns or tokens.
        for what in ("loss_error", "hidden_error", "weight_error", "partial_error"):
            assert case[what] <= 2e-6 * max(case["scale"], 15), (what, case)
        gathers = case["chunks"] if case["in_forward"] and case["name"] != "five" else 1
        assert case["chunks"] > 1
        assert case["forward"] == ({} if case["size"] == 1 else {"all_gather_into_tensor": gathers})
        assert case["backward"] == ({} if case["size"] == 1 else {"all_reduce": 1})


def test_metrics_of_tokens(results):
    for case in select(results, "tokens"):
        assert case["error"] <= 5e-6, case  # as losses: float32 roundings of logits up to 14
        assert case["same_top"] and case["same_top5"] and 0.5 < case["top5"] < 1, case
        assert case["collectives"] == ({} if case["size"] == 1 else {"all_gather_into_tensor": 3})
