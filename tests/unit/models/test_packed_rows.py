"""Which tokens of a packed row a context-parallel rank holds: the same to Mamba layers as to the data and attention."""

import pytest
import torch

from megatron_qad.engine import init_runtime

init_runtime()
from megatron_qad.models.context_parallel import partitioned_indices, take_chunks  # noqa: E402


@pytest.mark.parametrize(("lengths", "size"), [([8, 4], 2), ([16, 8, 8, 32], 4), ([12], 3)])
def test_they_are_those_that_the_data_gives_it(lengths, size):
    row, ends = torch.arange(sum(lengths)), torch.tensor([0, *lengths]).cumsum(0)
    shares = [partitioned_indices(ends, sum(lengths), size, rank) for rank in range(size)]
    for rank, share in enumerate(shares):
        assert share.tolist() == take_chunks(row.unsqueeze(0), lengths, rank, size)[0].tolist()
    assert sorted(torch.cat(shares).tolist()) == row.tolist()


def test_documents_of_other_lengths_are_an_error():
    with pytest.raises(AssertionError, match="do not divide"):
        partitioned_indices(torch.tensor([0, 6, 12]), 12, 2, 0)
