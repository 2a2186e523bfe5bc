"""Megatron's GPTDataset with a per-token loss mask.

Samples are cut exactly as GPTDataset cuts them: documents are concatenated and split into ``sequence_length + 1``
tokens. The loss mask of a sample refers to its *labels*, so it is the tokens' mask shifted by one. With Megatron's flag
``--dataloader-inter-document-masking`` the documents of a sample are separated (``packing``).
"""

import copy
import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

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


class QADDataset(GPTDataset):
    """GPTDataset whose ``loss_mask`` comes from PREFIX_loss_mask.bin/.idx; without those files every token counts.

    ``dataset[i]`` is a dict: ``tokens`` int64 [s], ``labels`` int64 [s] (the token after), ``loss_mask`` float32 [s]
    (1.0 where the label counts), ``position_ids`` int64 [s], and ``attention_mask`` only if the config asks for it.
    Padding never counts. With ``eod_mask_loss`` neither does the label that follows an EOD, as in GPTDataset; the EOD
    is the one recorded in PREFIX.json, or the tokenizer's if that file does not exist. With ``inter_document_masking``
    the documents are separated (``packing``), and ``cu_seqlens`` has their ends.

    Raises:
        QADError: a split without tokens, or a loss mask that is missing or does not match the tokens.
    """

    def __init__(self, indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config) -> None:
        self._metadata = load_metadata(dataset_path)
        self._mask = _open_loss_mask(dataset_path, indexed_dataset, config.mmap_bin_files, self._metadata)
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        self._pad_token_id = _PADDING
        # A job's tokenizer is usually Megatron's NullTokenizer, whose EOD is not that of the data.
        self._eod = config.tokenizer.eod if self._metadata is None else self._metadata.eod

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(idx)
        extra = self.config.add_extra_token_to_sequence
        # GPTDataset's own mask cannot be used: it caches the mask of the first sample requested, padding included, and
        # returns it for every later sample.
        counts = np.zeros(self.config.sequence_length + 1, dtype=np.float32)
        pieces = [] if idx is None else self._pieces(idx)  # None requests a sample that only fills a batch
        position = 0
        for document, offset, length in pieces:
            counts[position : position + length] = (
                1 if self._mask is None else self._mask.get(document, offset=offset, length=length)
            )
            position += length
        if not extra:
            counts[self.config.sequence_length :] = 0  # the last label is unknown
        loss_mask = torch.from_numpy(counts[1:].copy())
        if self.config.eod_mask_loss:
            loss_mask[sample["tokens"] == self._eod] = 0.0
        sample["loss_mask"] = loss_mask
        if self.config.inter_document_masking:
            lengths = [length for _, _, length in pieces]
            if lengths and extra:
                lengths[-1] -= 1  # the extra token is a label only
            # The last length is 0 if its document starts directly after the row.
            lengths = [n for n in lengths[:-1] if n] + lengths[-1:]
            return separate_documents(sample, lengths, self.config.pad_documents_to)
        return sample

    def has_counted_tokens(self) -> bool:
        """Whether any token of this split counts in the loss.

        Reads the mask up to the first token that counts. With ``fast_cache_load`` there is no index yet, and the
        result is True without reading."""
        if self._mask is None or self.indices is None:
            return True
        return any(self._mask.get(int(document)).any() for document in self.indices)

    def _pieces(self, idx: int) -> list[tuple[int, int, int]]:
        """Return (document, offset, length) of each piece of sample ``idx``, in order."""
        shuffled = self.shuffle_index[idx]
        first, first_offset = (int(n) for n in self.sample_index[shuffled])
        last, last_offset = (int(n) for n in self.sample_index[shuffled + 1])
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
        # Megatron caches the indices under a name made of paths and settings. Data prepared again under the same prefix
        # would be cut with the old indices; a hash of the content in the name prevents that.
        if self._metadata is not None:
            self.unique_identifiers["content"] = self._metadata.sha256
            self.unique_description = json.dumps(
                self.unique_identifiers, indent=4, default=lambda obj: obj.unique_identifiers
            )
            self.unique_description_hash = hashlib.md5(
                self.unique_description.encode("utf-8"), usedforsecurity=False
            ).hexdigest()
        return super()._build_document_sample_shuffle_indices()

    def _pads_last_sample(self) -> bool:
        return self.index_split == Split.valid and not self.config.drop_last_partial_validation_sequence

    def _check_not_empty(self) -> None:
        """Check that the split has enough tokens: GPTDataset adds epochs until it has enough, with none forever."""
        if self.indices is None:  # --dataloader-fast-cache-load: the indices were built and checked earlier
            return
        tokens = self._get_num_tokens_per_epoch()
        # With a fixed number of samples the data is repeated as often as needed. Otherwise one epoch must contain a
        # sample, at least a token and its label followed by padding.
        needed = (
            1 if self.num_samples is not None else 2 if self._pads_last_sample() else self.config.sequence_length + 1
        )
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
