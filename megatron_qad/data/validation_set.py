"""The held-out set as every evaluation of every run sees it: in one fixed order, from its first sample.

Megatron's own evaluations go on in the data where the last one stopped, so that no two of them read the same tokens.
Here the order depends on the data, ``--split`` and ``--seq-length`` alone: not on ``--seed``, the number of iterations,
the batch size, the parallel layout or a resume. Left out: several validation sets.
"""

import argparse
import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from megatron_qad.data.dataset import QADDataset, QADDatasetConfig

DEFAULT_TOKENS = 1 << 20
"""Tokens of an evaluation without ``--eval-iters``, masked ones included: of a larger set, the first so many."""

_SEED = 20260120  # any number, but one for all runs
_ENDLESS = 1 << 31  # evaluations; a dataset needs a length


class ValidationSet(Dataset):
    """The first samples of a dataset, again and again: Megatron's sampler only ever counts up.

    Where an evaluation reads more samples than there are, because global batches are whole, the rest are fillers: real
    samples whose loss mask is zero. So sums over counted tokens are exact, and calibration, which may read here, sees
    real tokens.

    Args:
        samples: in the order in which they are evaluated.
        num_samples: how many of them an evaluation counts, 1 or more.
        samples_per_evaluation: how many Megatron reads in one, at least ``num_samples``.
    """

    split = Split.valid  # what Megatron's data loader goes by

    def __init__(self, samples: Dataset, num_samples: int, samples_per_evaluation: int):
        self.samples, self.num_samples = samples, num_samples
        self.samples_per_evaluation = samples_per_evaluation

    def describe(self) -> str:
        """How many samples an evaluation counts, of how many; "all 17 validation samples"."""
        if isinstance(self.samples, _WeightedBlend) and not self.samples.is_whole:
            return f"the first {self.num_samples} validation samples"
        available = len(self.samples)
        which = "all" if self.num_samples == available else f"the first {self.num_samples} of"
        return f"{which} {available} validation samples"

    def __len__(self) -> int:
        return self.samples_per_evaluation * _ENDLESS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = index % self.samples_per_evaluation
        sample = self.samples[place % self.num_samples]
        if place >= self.num_samples:
            return sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}
        return sample


class _WeightedBlend(Dataset):
    """Samples of several datasets in the proportions of their weights, up to ``limit`` and only as long as none comes
    twice."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], limit: int):
        from megatron.core.datasets import helpers  # compiled, and not there before the job has started

        lengths = np.array([len(dataset) for dataset in datasets])
        size = min(limit, int(lengths.sum()) + 1)
        self.datasets = datasets
        self._which, self._sample = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
        shares = [weight / sum(weights) for weight in weights]
        helpers.build_blending_indices(self._which, self._sample, shares, len(datasets), size, False)
        repeated = np.flatnonzero(self._sample >= lengths[self._which])
        self.is_whole = len(repeated) > 0
        """Whether it goes as far as it can; otherwise ``limit`` ended it."""
        self._size = int(repeated[0]) if self.is_whole else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.datasets[self._which[index]][int(self._sample[index])]


def samples_per_iteration(args: argparse.Namespace) -> int:
    """Samples that Megatron reads in each of the ``--eval-iters`` iterations of an evaluation."""
    at_once = args.eval_micro_batch_size * args.data_parallel_size
    return args.eval_global_batch_size // at_once * at_once


def config_for_split(config: QADDatasetConfig, split: Split) -> QADDatasetConfig:
    """``config`` for a builder of this split and no other."""
    config = copy.copy(config)
    if config.blend is not None:
        config.split_matrix = [part if i == split.value else None for i, part in enumerate(config.split_matrix)]
    else:
        config.blend_per_split = [part if i == split.value else None for i, part in enumerate(config.blend_per_split)]
    return config


def ordered_samples(config: QADDatasetConfig, is_built_on_rank: Callable[[], bool], limit: int) -> Dataset | None:
    """Every sample of the validation split once, in the fixed order; None on ranks that hold no data.

    A blend without weights is taken whole, one with weights in their proportions and as far as no sample repeats. The
    last sample, which is rarely full, is padded.

    Args:
        limit: samples of a blend with weights that anyone is going to ask for.
    """
    config = config_for_split(config, Split.valid)
    config.random_seed = _SEED
    config.drop_last_partial_validation_sequence = False
    blend = config.blend if config.blend is not None else config.blend_per_split[Split.valid.value]
    if blend is None:
        return None
    prefixes, weights = blend
    # The builder would repeat samples of a blend with weights, and how many depends on the size that is asked for.
    if config.blend is not None:
        config.blend = (prefixes, None)
    else:
        config.blend_per_split[Split.valid.value] = (prefixes, None)
    _, samples, _ = BlendedMegatronDatasetBuilder(QADDataset, [None] * len(Split), is_built_on_rank, config).build()
    if weights is not None and isinstance(samples, BlendedDataset):
        return _WeightedBlend(samples.datasets, weights, limit)
    return samples
