"""Documents of uniformly random tokens: the data source that needs neither text nor a model's forward pass.

The paper (arXiv:2601.20088, Table 5) distills on them as a lower bound for the quality of data.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_qad.data.generate import GenerateOptions
from megatron_qad.data.tokenizer import load_tokenizer


class RandomTokens:
    """A source of documents (``generate.Source``): token ids drawn uniformly from the tokens that are not special.

    Each line is ``{"input_ids": [...]}`` with ``max_new_tokens`` ids. Ids, and not text, because tokenizing the text of
    random tokens gives other tokens.

    Args:
        tokenizer: Hugging Face directory or sentencepiece file.
        options: the number and the length of the documents, and the seed.

    Raises:
        QADError: the tokenizer cannot be loaded.
    """

    batch_size = 1

    def __init__(self, tokenizer: str | Path, options: GenerateOptions):
        self._tokenizer, self._options = load_tokenizer(tokenizer), options
        self._ids = np.array(sorted(set(self._tokenizer.vocab.values()) - self._tokenizer.special))

    def settings(self) -> dict[str, Any]:
        """Return the sum of the vocabulary, the length and the seed."""
        return {
            "random tokens of": self._tokenizer.vocab_sha256(),
            "max_new_tokens": self._options.max_new_tokens,
            "seed": self._options.seed,
        }

    def documents(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        """Yield the lines of documents ``first`` to ``end - 1``."""
        for number in range(first, end):
            drawn = np.random.default_rng((self._options.seed, number)).choice(self._ids, self._options.max_new_tokens)
            yield {"input_ids": drawn.tolist()}
