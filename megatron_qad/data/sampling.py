"""Top-p sampling with temperature that does not sort the vocabulary.

transformers sorts the whole vocabulary in every step, which on a CPU takes most of a small model's generation time.
Here the 64 most likely tokens are looked up, and more only if their probability mass is too small.
"""

import torch
from torch import Tensor

_NUM_CANDIDATES, _GROWTH = 64, 8
_ROWS_PER_CHUNK = 16


class Sampler:
    """Logits processor that draws one token per row, for ``generate(do_sample=False)``, which takes the maximum.

    Args:
        temperature: above 0.
        top_p: in (0, 1]; 1 keeps every token.
    """

    def __init__(self, temperature: float, top_p: float):
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Overwrite ``scores``, float [b, V]: 0 for the token drawn (global generator), -inf for all others."""
        probabilities, tokens = nucleus(scores, self.temperature, self.top_p)
        drawn = tokens.gather(1, torch.multinomial(probabilities, 1))
        return scores.fill_(-torch.inf).scatter_(1, drawn, 0.0)


def nucleus(scores: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the tokens to draw from: a token is kept if the more likely ones have less than ``top_p`` of the mass.

    Args:
        scores: float [b, V], logits.
        temperature, top_p: see ``Sampler``.

    Returns:
        (probabilities, tokens): float [b, k], not normalized, 0 for tokens not kept; int64 [b, k], most likely first if
        ``top_p`` is below 1. k is at most V.
    """
    vocabulary = scores.shape[-1]
    if top_p == 1:
        return (scores / temperature).softmax(-1), torch.arange(vocabulary, device=scores.device).expand_as(scores)
    largest = scores.amax(-1, keepdim=True)
    # In chunks of rows, so that temporaries stay in a CPU's cache. Subnormal exponentials are slow on a CPU; clamping
    # to exp(-64) does not change the last bit of a sum that is at least 1.
    pairs = zip(scores.split(_ROWS_PER_CHUNK), largest.split(_ROWS_PER_CHUNK), strict=True)
    shares = ((rows - most).div_(temperature).clamp_(min=-64).exp_() for rows, most in pairs)
    mass = torch.cat([share.sum(-1, keepdim=True) for share in shares])
    k = _NUM_CANDIDATES
    while True:
        top, tokens = scores.topk(min(k, vocabulary))
        probabilities = (top - largest).div_(temperature).exp_() / mass
        cumulative = probabilities.cumsum(-1)
        if k >= vocabulary or bool((cumulative[:, -1] >= top_p).all()):
            return probabilities.masked_fill(cumulative - probabilities >= top_p, 0.0), tokens
        k *= _GROWTH
