"""Tokens drawn from logits: temperature, then the smallest set of likely tokens that has a share ``top_p`` of the mass.

transformers sorts the whole vocabulary for that set, in every step; on a CPU that takes most of a small model's
generation. Here the most likely tokens are looked up, 64 of them, and more only where those have too little mass.
"""

import torch
from torch import Tensor

_FIRST, _TIMES = 64, 8
_ROWS = 16


class Sampler:
    """Draws one token a row, as a logits processor of ``generate(do_sample=False)``, which takes the largest score.

    Args:
        temperature: above 0.
        top_p: in (0, 1]; 1 leaves every token in.
    """

    def __init__(self, temperature: float, top_p: float):
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores``, float [b, V], overwritten: 0 for the token drawn (global generator), -inf for all others."""
        probabilities, tokens = nucleus(scores, self.temperature, self.top_p)
        drawn = tokens.gather(1, torch.multinomial(probabilities, 1))
        return scores.fill_(-torch.inf).scatter_(1, drawn, 0.0)


def nucleus(scores: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """The tokens to draw from: a token is in if those before it have less than ``top_p`` of the mass.

    Args:
        scores: float [b, V], logits.
        temperature, top_p: see ``Sampler``.

    Returns:
        (probabilities, tokens): float [b, k], 0 for what is out, not normalized; int64 [b, k], most likely first where
        ``top_p`` is below 1. k is at most V.
    """
    vocabulary = scores.shape[-1]
    if top_p == 1:
        return (scores / temperature).softmax(-1), torch.arange(vocabulary, device=scores.device).expand_as(scores)
    largest = scores.amax(-1, keepdim=True)
    # By rows, so that on a CPU what is made on the way stays in its cache. Subnormal exponentials are slow there;
    # exp(-64) in their place does not reach the last bit of a sum that is at least 1.
    pairs = zip(scores.split(_ROWS), largest.split(_ROWS), strict=True)
    shares = ((rows - most).div_(temperature).clamp_(min=-64).exp_() for rows, most in pairs)
    mass = torch.cat([share.sum(-1, keepdim=True) for share in shares])
    k = _FIRST
    while True:
        top, tokens = scores.topk(min(k, vocabulary))
        probabilities = (top - largest).div_(temperature).exp_() / mass
        up_to = probabilities.cumsum(-1)
        if k >= vocabulary or bool((up_to[:, -1] >= top_p).all()):
            return probabilities.masked_fill(up_to - probabilities >= top_p, 0.0), tokens
        k *= _TIMES
