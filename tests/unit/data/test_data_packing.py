"""Packed rows: document starts, loss mask and dropped tokens."""

import torch

from megatron_qad.data.packing import separate_documents


def sample(size: int) -> dict[str, torch.Tensor]:
    tokens = torch.arange(1, size + 1)
    return {"tokens": tokens, "labels": tokens + 1, "loss_mask": torch.ones(size)}


def test_documents_start_at_multiples_of_four():
    row = separate_documents(sample(16), [5, 4, 7], multiple=4)
    assert row["tokens"].tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 9, 10, 11, 12, 13]
    assert row["labels"].tolist() == [2, 3, 4, 5, 6, 0, 0, 0, 7, 8, 9, 10, 11, 12, 13, 14]
    # The last label of a complete document does not count; the last document is cut, so its last label counts.
    assert row["loss_mask"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    assert row["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2, 3]
    assert row["cu_seqlens"].tolist() == [0, 8, 12] + [16] * 14


def test_documents_after_a_full_row_are_dropped():
    row = separate_documents(sample(8), [5, 2, 1], multiple=4)
    assert row["tokens"].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert row["cu_seqlens"].tolist() == [0] + [8] * 8


def test_last_label_counts_only_if_the_document_is_cut():
    assert separate_documents(sample(8), [8], multiple=1)["loss_mask"].tolist() == [1] * 8  # cut
    row = separate_documents(sample(8), [8, 0], multiple=1)  # ended
    assert row["loss_mask"].tolist() == [1] * 7 + [0] and row["cu_seqlens"].tolist() == [0] + [8] * 8


def test_padding_does_not_count():
    for lengths, counted in (([3], 3), ([], 0)):
        row = separate_documents(sample(8), lengths, multiple=1)
        assert row["loss_mask"].sum() == counted
        assert row["cu_seqlens"].tolist() == ([0, 3] + [8] * 7 if lengths else [0] + [8] * 8)
