"""Megatron's builder of blended datasets, with cached indices that are checked before they are used."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_qad.data.index_cache import IndexCache
from megatron_qad.engine.errors import QADError


class QADBlendedDataset(BlendedDataset):
    """BlendedDataset whose indices are kept in an ``IndexCache`` (in memory only, if there is no --data-cache-path)."""

    def __getitem__(self, idx: int) -> dict:
        if self.dataset_index is None:  # --dataloader-defer-npy-index-mmap
            self.dataset_index, self.dataset_sample_index = load_cached(self._cache)
        return super().__getitem__(idx)

    def _build_indices(self):
        config, name = self.config, f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}"
        if not config.path_to_cache:
            return self._build_in_memory()
        arrays = ("dataset_index", "dataset_sample_index")
        base = Path(config.path_to_cache) / name
        self._cache = IndexCache(base, arrays, self.unique_description, config.unwritable_caches)
        if config.defer_npy_index_mmap:
            return None, None
        if config.fast_cache_load:
            return load_cached(self._cache)
        return self._cache.load_or_build(self._build_in_memory, writes=is_first_rank())

    def _build_in_memory(self):
        config = self.config
        self.config = without_cache(config)
        try:
            return super()._build_indices()
        except IndexError as error:
            raise QADError(
                f"the {self.split.name} blend of {len(self.datasets)} datasets needs more samples of one than were "
                f"built for it ({error}). Raise --mid-level-dataset-surplus (now {config.mid_level_dataset_surplus})."
            ) from error
        finally:
            self.config = config


class QADBlendBuilder(BlendedMegatronDatasetBuilder):
    """BlendedMegatronDatasetBuilder that builds ``QADBlendedDataset``s."""

    def __init__(self, *args, **kwargs):
        for module in (blended_dataset, gpt_dataset):
            module.logger.addFilter(_is_not_about_missing_cache)
        super().__init__(*args, **kwargs)

    @staticmethod
    def build_generic_dataset(cls: type, is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args):
        cls = QADBlendedDataset if cls is BlendedDataset else cls
        build = BlendedMegatronDatasetBuilder.build_generic_dataset
        return build(cls, is_built_on_rank, synchronize_ranks, *args)


def is_first_rank() -> bool:
    """Whether this process stores what all ranks read."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def without_cache(config):
    """Return a copy of a dataset's configuration with which Megatron builds indices in memory."""
    config = copy.copy(config)
    config.path_to_cache = ""
    return config


def load_cached(cache: IndexCache) -> tuple:
    """Return cached arrays for the flags that forbid building them.

    Raises:
        QADError: they are missing or damaged.
    """
    try:
        return cache.load()
    except QADError as error:
        raise QADError(
            f"{error}. --dataloader-fast-cache-load and --dataloader-defer-npy-index-mmap read an index cache that an "
            "earlier start wrote. Start once without them."
        ) from error


def _is_not_about_missing_cache(record: logging.LogRecord) -> bool:
    return "because path_to_cache is None" not in record.getMessage()
