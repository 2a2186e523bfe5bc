"""Rows of token ids for QADTrainer: padding them to a batch, and reading prepared data."""

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_qad.data.metadata import loss_mask_prefix
from megatron_qad.data.prefix_files import file_sizes
from megatron_qad.data.prepared_files import open_prefix
from megatron_qad.engine.errors import QADError

NO_LOSS = -100
"""Label of a token that does not count, as in transformers."""


def pad_rows(rows: Sequence[dict]) -> dict[str, Tensor]:
    """Return a batch of rows, padded on the right to the longest one.

    Args:
        rows: dictionaries with ``input_ids`` and optionally other entries of the same length: ``labels``,
            ``shift_labels``, ``attention_mask``, ``position_ids``. Labels are padded with -100, others with 0.

    Returns:
        int64 [rows, longest] by name. ``attention_mask`` is added if the lengths differ.
    """
    columns = {name: [torch.as_tensor(row[name]).long() for row in rows] for name in rows[0]}
    if "attention_mask" not in columns and len({len(ids) for ids in columns["input_ids"]}) > 1:
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
    return {
        name: pad_sequence(values, batch_first=True, padding_value=NO_LOSS if name.endswith("labels") else 0)
        for name, values in columns.items()
    }


class PreparedRows(torch.utils.data.Dataset):
    """The documents of prepared data (PREFIX.bin/.idx, with or without a loss mask) as rows for ``QADTrainer``.

    A document of more than ``max_length`` tokens becomes several rows; documents never share a row. ``rows[i]`` has
    ``input_ids`` and ``labels``, int64 [at most max_length], where a label of a token that does not count is -100.

    Args:
        prefix: ``output`` of ``prepare_data``.
        max_length: largest number of tokens of a row, at least 2.

    Raises:
        QADError: files are missing, damaged, or do not belong together.
    """

    def __init__(self, prefix: str, max_length: int):
        if max_length < 2:
            raise QADError(f"max_length is {max_length}, expected at least 2: a token and its label.")
        file_sizes(prefix)
        open_prefix(prefix)
        self._tokens = IndexedDataset(prefix)
        mask = loss_mask_prefix(prefix)
        self._mask = IndexedDataset(mask) if IndexedDataset.exists(mask) else None
        self._max_length = max_length
        pieces = -(-self._tokens.sequence_lengths.astype(np.int64) // max_length)
        self._last: np.ndarray = np.cumsum(pieces)  # the number of rows up to and including each document
        self._pieces = pieces

    def __len__(self) -> int:
        return int(self._last[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        document = int(np.searchsorted(self._last, index, side="right"))
        offset = (index - int(self._last[document] - self._pieces[document])) * self._max_length
        length = min(self._max_length, int(self._tokens.sequence_lengths[document]) - offset)
        ids = torch.from_numpy(self._tokens.get(document, offset=offset, length=length).astype(np.int64))
        labels = ids
        if self._mask is not None:
            counts = torch.from_numpy(self._mask.get(document, offset=offset, length=length).astype(bool))
            labels = ids.masked_fill(~counts, NO_LOSS)
        return {"input_ids": ids, "labels": labels}
