"""Megatron's GPTDataset with a per-token loss mask.

Samples are cut exactly as GPTDataset cuts them: documents are concatenated and split into ``sequence_length + 1``
tokens. The loss mask of a sample refers to its *labels*, so it is the tokens' mask shifted by one. With Megatron's flag
``--dataloader-inter-document-masking`` the documents of a sample are separated (``packing``). Exception: samples of a
prefix with images have whole documents (``images.image_rows``).
"""

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_qad.data.bad_document import BadDocument
from megatron_qad.data.blending import is_first_rank, load_cached, without_cache
from megatron_qad.data.images.image_rows import check_image_rows, pack_whole_documents
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.images.row_images import RowImages
from megatron_qad.data.images.tiles import register_collation
from megatron_qad.data.index_cache import IndexCache
from megatron_qad.data.metadata import load_metadata, loss_mask_prefix
from megatron_qad.data.packing import separate_documents
from megatron_qad.engine.errors import QADError

# No token has this id, so only padding carries it. GPTDataset would use the tokenizer's pad token and then replace that
# token with 0 wherever it occurs in a document.
_PADDING = -1

# With a padded last sample, Megatron's helper counts samples in float32, which is exact up to 2^24 tokens. Larger sets
# drop the last sample instead.
_MAX_TOKENS_WITH_PADDING = 1 << 23


@dataclass
class QADDatasetConfig(GPTDatasetConfig):
    """Megatron's dataset configuration plus the setting of packed rows."""

    pad_documents_to: int = 1
    """Documents of a packed row start at multiples of this many tokens."""
    vocab_size: int | None = None
    """Number of ids of the model, without padding; None if it is unknown."""
    images: ImageSettings | None = None
    """How the model turns images into tokens; None: a model or a job without images."""
    decodes_images: bool = True
    """Whether samples have the pixels of their tiles; only the ranks with the encoder need them."""
    unwritable_caches: set[Path] = field(default_factory=set)
    """Directories of indices in which writing has failed."""


class SampleError(QADError):
    """A sample that must not be trained on. It has one line also if a data worker raised it, where torch puts the
    traceback of the worker before it."""

    def __init__(self, message: str):
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class QADDataset(GPTDataset):
    """GPTDataset whose ``loss_mask`` comes from PREFIX_loss_mask.bin/.idx; without those files every token counts.

    ``dataset[i]`` is a dict: ``tokens`` int64 [s], ``labels`` int64 [s] (the token after), ``loss_mask`` float32 [s]
    (1.0 where the label counts), ``position_ids`` int64 [s], and ``attention_mask`` only if the config asks for it.
    Padding never counts. With ``eod_mask_loss`` neither does the label that follows an EOD, as in GPTDataset; the EOD
    is the one recorded in PREFIX.json, or the tokenizer's if that file does not exist. With ``inter_document_masking``
    the documents are separated (``packing``), and ``cu_seqlens`` has their ends.

    If the job has images, a sample also has ``feature_index`` int64 [s] and ``tiles`` (``images.row_images``). A prefix
    without images then has -1 and no tiles.

    Raises:
        QADError: a split without tokens, a loss mask that is missing or does not match the tokens, or images that the
            job's model does not have, turns into other tokens, or cannot have in one row.
        SampleError: in ``dataset[i]``: a token id that the model does not have, a mask that is neither 0 nor 1, or
            tokens that do not match the images.
    """

    def __init__(self, indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config) -> None:
        self._metadata = load_metadata(dataset_path)
        self._mask = _open_loss_mask(dataset_path, indexed_dataset, config.mmap_bin_files, self._metadata)
        self._has_images = self._metadata is not None and self._metadata.images is not None
        if self._has_images:
            lengths = indexed_dataset.sequence_lengths
            check_image_rows(dataset_path, self._metadata, config.images, lengths, config.sequence_length)
        self._images, self.decodes_images = None, config.decodes_images
        if config.images is not None:
            prefix = dataset_path if self._has_images else None
            self._images = RowImages(prefix, config.images, config.mmap_bin_files)
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        self._pad_token_id = _PADDING
        # A job's tokenizer is usually Megatron's NullTokenizer, whose EOD is not that of the data.
        self._eod = config.tokenizer.eod if self._metadata is None else self._metadata.eod

    def __len__(self) -> int:
        if self._has_images and self.sample_index is None:  # --dataloader-defer-npy-index-mmap
            self._load_deferred()
        return len(self.sample_index) - 1 if self._has_images else super().__len__()

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        extra = self.config.add_extra_token_to_sequence
        # GPTDataset's own mask cannot be used: it caches the mask of the first sample requested, padding included, and
        # returns it for every later sample.
        counts = np.zeros(self.config.sequence_length + 1, dtype=np.float32)
        pieces = [] if idx is None else self._pieces(idx)  # None requests a sample that only fills a batch
        position = 0
        for document, offset, length in pieces:
            counts[position : position + length] = self._counted(document, offset, length)
            position += length
        if not extra:
            counts[self.config.sequence_length :] = 0  # the last label is unknown
        loss_mask = torch.from_numpy(counts[1:].copy())
        if self.config.eod_mask_loss:
            loss_mask[sample["tokens"] == self._eod] = 0.0
        sample["loss_mask"] = loss_mask
        if self._images is not None:
            sample |= self._image_items(sample["tokens"], pieces)
        if self.config.inter_document_masking:
            lengths = self._lengths_in_row(pieces)
            tiles = {"tiles": sample["tiles"]} if self._images is not None else {}
            return separate_documents(sample, lengths, self.config.pad_documents_to) | tiles
        return sample

    def _lengths_in_row(self, pieces: list[tuple[int, int, int]]) -> list[int]:
        """Return the lengths of a sample's documents for ``separate_documents``."""
        lengths = [length for _, _, length in pieces]
        if self._has_images:
            return [*lengths, 0]  # all are complete
        if lengths and self.config.add_extra_token_to_sequence:
            lengths[-1] -= 1  # the extra token is a label only
        # The last length is 0 if its document starts directly after the row.
        return [n for n in lengths[:-1] if n] + lengths[-1:]

    def _image_items(self, tokens: torch.Tensor, pieces: list[tuple[int, int, int]]) -> dict:
        register_collation()
        try:
            index, refs = self._images.feature_index(tokens, [(document, length) for document, _, length in pieces])
            return {"feature_index": index, "tiles": self._images.tiles(refs, self.decodes_images)}
        except BadDocument as error:
            raise SampleError(f"{self.dataset_path}: {error}. Copy or prepare the data again.") from error

    def images_sha256(self) -> str:
        """Return the hash of the file with the images; empty for data without images."""
        return self._metadata.sha256["images.bin"] if self._has_images else ""

    @contextlib.contextmanager
    def without_pixels(self) -> Iterator[None]:
        """Read samples without decoding their images inside of the block."""
        before, self.decodes_images = self.decodes_images, False
        try:
            yield
        finally:
            self.decodes_images = before

    def has_counted_tokens(self) -> bool:
        """Whether any token of this split counts in the loss.

        Reads the mask up to the first token that counts. With ``fast_cache_load`` there is no index yet, and the
        result is True without reading."""
        if self.indices is None:
            return True
        # If documents are separated, the first token of a document is not a label.
        first = int(self.config.inter_document_masking or self.config.eod_mask_loss)
        if self._mask is None:
            return bool((self.dataset.sequence_lengths[self.indices] > first).any())
        return any(self._mask.get(int(document))[first:].any() for document in self.indices)

    def _counted(self, document: int, offset: int, length: int) -> np.ndarray | int:
        if self._mask is None:
            return 1
        counted = self._mask.get(document, offset=offset, length=length)
        if len(counted) and (largest := counted.max()) > 1:
            raise SampleError(
                f"{loss_mask_prefix(self.dataset_path)}.bin: document {document} has the value {largest}, expected 0 "
                "or 1. Copy or prepare the data again."
            )
        return counted

    def _query_document_sample_shuffle_indices(self, idx: int):
        if self.shuffle_index is None:
            self._load_deferred()
        if self._has_images:
            text, documents, lengths = self._whole_documents(idx)
        else:
            text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        self._check_ids(text[: sum(lengths)], documents, lengths)
        return text, documents, lengths

    def _load_deferred(self) -> None:
        """Load the indices that --dataloader-defer-npy-index-mmap did not load."""
        self.document_index, self.sample_index, self.shuffle_index = load_cached(self._cache)

    def _whole_documents(self, idx: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Return (ids with padding, documents, their lengths) of sample ``idx`` of a prefix with images."""
        pieces = self._pieces(idx)
        text = np.full(self.config.sequence_length + self.config.add_extra_token_to_sequence, _PADDING, dtype=np.int64)
        position = 0
        for document, _, length in pieces:
            text[position : position + length] = self.dataset.get(document)
            position += length
        return text, np.array([document for document, *_ in pieces]), [length for *_, length in pieces]

    def _check_ids(self, ids: np.ndarray, documents: np.ndarray, lengths: list[int]) -> None:
        """Check that the model has all ids of a sample: for data that is too large to be read at startup."""
        size = self.config.vocab_size
        if not len(ids) or (ids.min() >= 0 and (size is None or ids.max() < size)):
            return
        first = int(np.flatnonzero((ids < 0) | (size is not None and ids >= size))[0])
        document = int(documents[np.searchsorted(np.cumsum(lengths), first, side="right")])
        known = "ids below 0 do not exist" if ids[first] < 0 else f"the model has {size} ids"
        raise SampleError(
            f"{self.dataset_path}.bin: document {document} has the token id {ids[first]}, but {known}. Prepare the "
            "data with the model's tokenizer."
        )

    def _pieces(self, idx: int) -> list[tuple[int, int, int]]:
        """Return (document, offset, length) of each piece of sample ``idx``, in order."""
        shuffled = self.shuffle_index[idx]
        first, first_offset = (int(n) for n in self.sample_index[shuffled])
        last, last_offset = (int(n) for n in self.sample_index[shuffled + 1])
        if self._has_images:
            documents = self.document_index[first:last].tolist()
            return [(document, 0, int(self.dataset.sequence_lengths[document])) for document in documents]
        pieces = []
        for place in range(first, last + 1):
            document = int(self.document_index[place])
            begin = first_offset if place == first else 0
            end = int(self.dataset.sequence_lengths[document])
            if place == last:
                end = min(end, last_offset + int(self.config.add_extra_token_to_sequence))
            pieces.append((document, begin, end - begin))
        return pieces

    def _build_document_sample_shuffle_indices(self):
        self._check_not_empty()
        if self._pads_last_sample() and (self.indices is not None or self.config.defer_npy_index_mmap):
            if self._get_num_tokens_per_epoch() > _MAX_TOKENS_WITH_PADDING:
                self.config = copy.copy(self.config)
                self.config.drop_last_partial_validation_sequence = True
        self._identify_content()
        directory = self.config.path_to_cache or f"{self.dataset.path_prefix}/cache/{type(self).__name__}_indices"
        base = Path(directory) / f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        names = ("document_index", "sample_index", "shuffle_index")
        self._cache = IndexCache(base, names, self.unique_description, self.config.unwritable_caches)
        if self.config.defer_npy_index_mmap:
            return None, None, None
        if self.config.fast_cache_load:
            return load_cached(self._cache)
        return self._cache.load_or_build(self._build_in_memory, writes=is_first_rank())

    def _build_in_memory(self):
        config = self.config
        if self._has_images:
            lengths, multiple = self.dataset.sequence_lengths, config.pad_documents_to
            row, seed = config.sequence_length, config.random_seed
            return pack_whole_documents(self.indices, lengths, row, multiple, self.num_samples, seed)
        self.config = without_cache(config)
        try:
            return super()._build_document_sample_shuffle_indices()
        finally:
            self.config = config

    def _identify_content(self) -> None:
        """Add the content to the identity of the dataset, which names its cached indices.

        Megatron's identity consists of paths and settings, so data prepared again under the same prefix would be cut
        with the old indices."""
        if self._has_images:
            self.unique_identifiers["pad_documents_to"] = self.config.pad_documents_to
        if self._metadata is not None:
            content = self._metadata.sha256
        else:
            content = hashlib.sha256(np.ascontiguousarray(self.dataset.sequence_lengths)).hexdigest()
        self.unique_identifiers["content"] = content
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda obj: obj.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode("utf-8"), usedforsecurity=False
        ).hexdigest()

    def _pads_last_sample(self) -> bool:
        return self.index_split == Split.valid and not self.config.drop_last_partial_validation_sequence

    def _check_not_empty(self) -> None:
        """Check that the split has enough tokens: GPTDataset adds epochs until it has enough, with none forever."""
        if self.indices is None:  # --dataloader-fast-cache-load: the indices were built and checked earlier
            return
        tokens = self._get_num_tokens_per_epoch()
        # With a fixed number of samples the data is repeated as often as needed. Otherwise one epoch must contain a
        # sample, at least a token and its label followed by padding.
        pads = self._pads_last_sample() or self._has_images
        needed = 1 if self.num_samples is not None else 2 if pads else self.config.sequence_length + 1
        if tokens < needed:
            raise QADError(
                f"The {self.index_split.name} split of {self.dataset_path} has {len(self.indices)} of "
                f"{len(self.dataset)} documents and {tokens} tokens; expected at least {needed} tokens. Change --split "
                f"(now {self.config.split!r}; use '100,0,0' with --eval-iters 0 for no validation) or add data."
            )


def _open_loss_mask(prefix: str, tokens: IndexedDataset, mmap: bool, metadata) -> IndexedDataset | None:
    """Return the indexed dataset of the masks, or None if all tokens count."""
    mask_prefix = loss_mask_prefix(prefix)
    if not IndexedDataset.exists(mask_prefix):
        if metadata is not None and metadata.loss_mask:
            raise QADError(
                f"{prefix}.json records a loss mask, but {mask_prefix}.bin or .idx is missing; without it every token "
                "would count. Copy all files of the prefix, or prepare the data again."
            )
        return None
    mask = IndexedDataset(mask_prefix, multimodal=False, mmap=mmap)
    if mask.index.dtype != np.uint8 or not np.array_equal(mask.sequence_lengths, tokens.sequence_lengths):
        raise QADError(
            f"{mask_prefix} does not match {prefix}: expected uint8 and {len(tokens)} documents of the same lengths, "
            f"found {np.dtype(mask.index.dtype).name} and {len(mask)} documents. Prepare the data again."
        )
    return mask
