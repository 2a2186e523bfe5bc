"""Batches of rows of different lengths, and prepared data as rows."""

import pytest
import torch
from prepared import write_prepared

from megatron_qad.engine.errors import QADError
from megatron_qad.hf_training.training_rows import PreparedRows, pad_rows


def test_rows_are_padded_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = pad_rows(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, -100, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    equal = pad_rows([{"input_ids": torch.tensor([1, 2]), "shift_labels": torch.tensor([2, -100])}] * 2)
    assert sorted(equal) == ["input_ids", "shift_labels"] and equal["shift_labels"].dtype == torch.int64


def test_prepared_documents_are_cut_into_rows(tmp_path):
    documents, masks = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]], [[0, 1, 1, 0, 1], [1, 1], [0, 0, 1]]
    rows = PreparedRows(write_prepared(tmp_path / "data", documents, masks), 3)
    assert [rows[i]["input_ids"].tolist() for i in range(len(rows))] == [[1, 2, 3], [4, 5], [6, 7], [8, 9, 10]]
    assert [rows[i]["labels"].tolist() for i in range(len(rows))] == [[-100, 2, 3], [-100, 5], [6, 7], [-100, -100, 10]]
    with pytest.raises(IndexError):
        rows[4]
    unmasked = PreparedRows(write_prepared(tmp_path / "text", documents), 8)
    assert len(unmasked) == 3 and unmasked[0]["labels"].tolist() == documents[0]


def test_prepared_data_that_cannot_be_read(tmp_path):
    with pytest.raises(QADError, match="not found"):
        PreparedRows(str(tmp_path / "none"), 16)
    with pytest.raises(QADError, match="max_length is 1"):
        PreparedRows(write_prepared(tmp_path / "data", [[1, 2]]), 1)
