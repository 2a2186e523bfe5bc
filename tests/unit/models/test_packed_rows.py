"""Mamba layers get the same tokens of a packed row on each context-parallel rank as the data and attention."""

import pytest
import torch

from megatron_qad.engine import init_runtime

init_runtime()
from megatron_qad.models.context_parallel import partitioned_indices, take_chunks  # noqa: E402


@pytest.mark.parametrize(("lengths", "size"), [([8, 4], 2), ([16, 8, 8, 32], 4), ([12], 3)])
def test_partitioned_indices_equal_data_chunks(lengths, size):
    row, ends = torch.arange(sum(lengths)), torch.tensor([0, *lengths]).cumsum(0)
    shares = [partitioned_indices(ends, sum(lengths), size, rank) for rank in range(size)]
    for rank, share in enumerate(shares):
        assert share.tolist() == take_chunks(row.unsqueeze(0), lengths, rank, size)[0].tolist()
    assert sorted(torch.cat(shares).tolist()) == row.tolist()


def test_indivisible_document_lengths_raise():
    with pytest.raises(AssertionError, match="must be multiples of 2"):
        partitioned_indices(torch.tensor([0, 6, 12]), 12, 2, 0)
