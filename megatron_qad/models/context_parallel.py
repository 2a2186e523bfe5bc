"""Distribution of tokens over ranks under context parallelism and in packed rows, and gathering of keys and values.

Each sequence is split into ``2 * size`` equal chunks, of which a rank holds the chunks ``rank`` and
``2 * size - 1 - rank``. In this order, Megatron's load-balanced one, every rank does the same share of the work of
causal attention. A packed row is a concatenation of documents, each of which is split separately. A single sequence is
a row of one document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass
class Documents(PackedSeqParams):
    """Megatron's description of a packed row, extended with the document lengths on the host."""

    document_lengths: list[int] | None = None
    """Global lengths, not those of this rank's share."""

    @classmethod
    def from_lengths(cls, lengths: list[int], device=None) -> "Documents":
        """Describe a packed row of documents with these global lengths."""
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends = ends.to(device) if device is not None else ends
        # The longest document, not the row: with the row's length, Megatron's rotary embedding would continue the
        # positions of the first document in the second.
        longest = max(lengths)
        # With the total, Megatron computes document indices; without them, Mamba states would cross documents.
        return cls(
            *("thd", ends, ends),
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            total_tokens=sum(lengths),
            document_lengths=lengths,
        )


def document_lengths(packed_seq_params) -> list[int]:
    """Return the global lengths of the documents of a packed row."""
    lengths = getattr(packed_seq_params, "document_lengths", None)
    if lengths is not None:
        return lengths
    return packed_seq_params.cu_seqlens_q.diff().tolist()  # synchronizes with the device


def spans(lengths: Sequence[int], rank: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first query, end query, first key, end key) for each chunk of this rank.

    Queries are counted in the rank's local order, keys in the global order. The last query of a chunk sees all its
    keys, so the causal mask is aligned to the lower right.

    Args:
        lengths: global lengths of the documents.
        rank, size: rank in the context-parallel group, and its size.
    """
    start = 0
    for length in lengths:
        if size == 1:
            yield start, start + length, start, start + length
        else:
            if length % (2 * size):
                raise ValueError(
                    f"document of {length} tokens: expected a multiple of 2 * {size}, twice the context-parallel size."
                )
            chunk = length // (2 * size)
            for position, index in enumerate((rank, 2 * size - 1 - rank)):
                first = start // size + position * chunk
                yield first, first + chunk, start, start + (index + 1) * chunk
        start += length


def gather_in_order(key: Tensor, value: Tensor, lengths: Sequence[int], group) -> tuple[Tensor, Tensor]:
    """Gather the keys and values of all context-parallel ranks in global token order.

    The backward pass sums the gradients over the ranks.

    Args:
        key, value: this rank's chunks, document by document, [t/cp, ...].
        lengths: global lengths of the documents.
        group: context-parallel process group.
    """
    size = group.size()
    # One collective for both.
    both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=group)
    chunks = [length // (2 * size) for length in lengths for _ in range(2)]
    parts = both.split(chunks * size)
    rank_and_position = [(i, 0) for i in range(size)] + [(i, 1) for i in reversed(range(size))]
    ordered = [
        parts[rank * len(chunks) + 2 * document + position]
        for document in range(len(lengths))
        for rank, position in rank_and_position
    ]
    key, value = torch.cat(ordered).split((key.shape[-1], value.shape[-1]), dim=-1)
    return key, value


def take_chunks(x: Tensor, lengths: Sequence[int], rank: int, size: int) -> Tensor:
    """Return this rank's chunks of ``x`` [b, s, ...], in its local order.

    Args:
        lengths: global lengths of the documents in each row. A single sequence is one document.
    """
    if size == 1:
        return x
    # The last query of a span is also its last key.
    return torch.cat([x[:, end - (b - a) : end] for a, b, _, end in spans(lengths, rank, size)], dim=1)


def partitioned_indices(documents: Tensor, total_tokens: int, size: int, rank: int) -> Tensor:
    """Return the indices of a rank's tokens of a packed row in its local order, int32 [total_tokens / size].

    It has the signature of Transformer Engine's ``thd_get_partitioned_indices``.

    Args:
        documents: offsets of the documents and the end of the last one, int [documents + 1]. Lengths must be multiples
            of ``2 * size``.
    """
    lengths = documents.diff().tolist()
    assert not any(length % (2 * size) for length in lengths), "document lengths must be multiples of 2 * size"
    row = torch.arange(total_tokens, dtype=torch.int32, device=documents.device)
    return take_chunks(row.unsqueeze(0), lengths, rank, size)[0]
