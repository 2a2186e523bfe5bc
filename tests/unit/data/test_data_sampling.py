"""Top-p sampling compared with transformers' logits warpers, and frequencies of the drawn tokens."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from megatron_qad.data.sampling import Sampler, nucleus

VOCABULARY = 3000


def expected(scores, temperature, top_p):
    """Return the probabilities [b, V] that transformers would draw from, in float64."""
    scores = TemperatureLogitsWarper(temperature)(None, scores.double()) if temperature != 1 else scores.double()
    return (TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores).softmax(-1)


# The last case keeps thousands of tokens, so 64 and 512 candidates are not enough.
@pytest.mark.parametrize(
    ("temperature", "top_p", "spread"), [(0.2, 0.9, 3.0), (1.0, 0.9, 6.0), (1.0, 1.0, 3.0), (1.5, 0.95, 0.5)]
)
def test_nucleus_matches_transformers(temperature, top_p, spread):
    torch.manual_seed(0)
    scores = torch.randn(40, VOCABULARY) * spread
    reference = expected(scores, temperature, top_p)
    probabilities, tokens = nucleus(scores.clone(), temperature, top_p)
    assert tokens.shape == probabilities.shape and tokens.shape[1] <= VOCABULARY
    dense = torch.zeros(40, VOCABULARY, dtype=torch.float64).scatter_(1, tokens, probabilities.double())
    assert torch.equal(dense > 0, reference > 0)
    # The tolerance allows for float32 exponentials and sums of 3,000 of them, compared with float64.
    torch.testing.assert_close(dense / dense.sum(-1, keepdim=True), reference, rtol=1e-5, atol=1e-12)


def test_most_likely_token_is_always_kept():
    scores = torch.zeros(1, VOCABULARY)
    scores[0, 7] = 50.0
    probabilities, tokens = nucleus(scores, 1.0, 1e-6)
    assert tokens[0, 0] == 7 and int((probabilities > 0).sum()) == 1


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_tokens_are_drawn_with_their_probability(top_p):
    torch.manual_seed(0)
    row = torch.randn(200) * 2
    probability = expected(row[None], 0.7, top_p)[0]
    draws = 40_000
    scores = Sampler(0.7, top_p)(None, row.repeat(draws, 1))
    assert torch.equal((scores == 0).sum(-1), torch.ones(draws, dtype=torch.int64)) and int(scores.isinf().sum()) > 0
    counts = torch.bincount(scores.argmax(-1), minlength=200).double()
    assert counts[probability == 0].sum() == 0
    deviation = (draws * probability * (1 - probability)).sqrt()
    # Five standard deviations of a binomial for 200 tokens fail for one seed in ten thousand; + 3 for rare tokens.
    assert bool(((counts - draws * probability).abs() <= 5 * deviation + 3).all())
