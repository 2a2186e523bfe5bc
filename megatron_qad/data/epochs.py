"""How often a job reads its training data."""

from collections.abc import Sequence

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_qad.data.dataset import QADDatasetConfig
from megatron_qad.data.images.image_rows import count_rows
from megatron_qad.data.metadata import load_metadata

MAX_EPOCHS = 16
"""Text that is repeated up to 4 times trains about as well as new text; the value of further repetitions decays with a
constant of about 15 epochs (Muennighoff et al. 2023, arXiv:2305.16264)."""


def describe_epochs(config: QADDatasetConfig, num_samples: int) -> list[str]:
    """Return how many epochs a job reads, in one line, and a warning if they are more than ``MAX_EPOCHS``.

    Args:
        config: its blend names the prefixes; their indices are read.
        num_samples: number of sequences that the job trains on.
    """
    if config.blend is not None:
        blend, (begin, end) = config.blend, config.split_matrix[0] or (0, 0)
    else:
        blend, (begin, end) = config.blend_per_split[0], (0, 1)
    if blend is None or begin == end:  # no training data
        return []
    prefixes, weights = blend
    tokens = [_num_tokens(prefix, config) * (end - begin) for prefix in prefixes]
    needed = num_samples * config.sequence_length
    epochs = epochs_of(needed, tokens, weights)
    most = max(range(len(epochs)), key=epochs.__getitem__)
    line = (
        f"{needed:,} training tokens are {needed / sum(tokens):.3g} epochs of the training data "
        f"({sum(tokens):,.0f} tokens)"
    )
    if weights is not None and len(prefixes) > 1:
        line += f"; with the weights of the blend up to {epochs[most]:.3g} of {prefixes[most]}"
    if epochs[most] <= MAX_EPOCHS:
        return [line]
    return [
        line,
        f"WARNING: {prefixes[most]} is read {epochs[most]:,.0f} times. From about {MAX_EPOCHS} epochs on, repeated "
        "text trains little that is new (arXiv:2305.16264), and the student fits this text only; the validation KL "
        f"shows it. Train on fewer steps, at most {MAX_EPOCHS / epochs[most]:.0%} of these, or prepare more data.",
    ]


def epochs_of(needed: float, tokens: Sequence[float], weights: Sequence[float] | None) -> list[float]:
    """Return the epochs of each part of a blend.

        >>> epochs_of(100, [50, 25], None), epochs_of(100, [50, 25], [1, 1])
        ([1.3333333333333333, 1.3333333333333333], [1.0, 2.0])

    Args:
        needed: number of tokens that are read of all parts together.
        tokens: number of tokens of each part.
        weights: shares of the parts, which need not sum to 1; None: the parts are read in proportion to their tokens.
    """
    weights = tokens if weights is None else weights
    return [needed * weight / sum(weights) / max(size, 1) for size, weight in zip(tokens, weights, strict=True)]


def _num_tokens(prefix: str, config: QADDatasetConfig) -> int:
    """Return the number of tokens of an epoch; rows with images have padding, which counts."""
    data = IndexedDataset(prefix, mmap=False)  # its end unmaps the lengths
    metadata = load_metadata(prefix)
    if metadata is not None and metadata.images is not None:
        row = config.sequence_length
        return count_rows(data.index.sequence_lengths, row, config.pad_documents_to) * row
    return int(data.index.sequence_lengths.sum(dtype=np.int64))
