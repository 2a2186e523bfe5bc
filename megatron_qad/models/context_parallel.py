"""Who holds which tokens under context parallelism and in packed rows, and how keys and values come together.

Of each sequence a rank holds the chunks ``rank`` and ``2 * size - 1 - rank`` of ``2 * size`` equal ones: Megatron's
load-balanced order, in which every rank has the same share of a causal attention's work. A packed row holds documents
one after the other, and each of them is cut into such chunks by itself. One sequence is a row of one document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass
class Documents(PackedSeqParams):
    """Megatron's description of a packed row, with the documents' lengths on the host beside it."""

    document_lengths: list[int] | None = None
    """Global, not this rank's share."""

    @classmethod
    def from_lengths(cls, lengths: list[int], device=None) -> "Documents":
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends = ends.to(device) if device is not None else ends
        # The longest document and not the row: were it the row's length, Megatron's rotary embedding would take the
        # positions of the second document for a continuation of the first.
        longest = max(lengths)
        # The total makes Megatron number the tokens' documents, without which a Mamba state would run through all.
        return cls(
            *("thd", ends, ends),
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            total_tokens=sum(lengths),
            document_lengths=lengths,
        )


def document_lengths(packed_seq_params) -> list[int]:
    """Global lengths of the documents of a packed row."""
    known = getattr(packed_seq_params, "document_lengths", None)
    if known is not None:
        return known
    return packed_seq_params.cu_seqlens_q.diff().tolist()  # waits for the device


def spans(lengths: Sequence[int], rank: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """(first, end) of the rank's queries and (first, end) of the keys that the last of them sees, chunk by chunk.

    Queries are counted in the rank's own order, keys in the global one. Every span is causal from its lower right.

    Args:
        lengths: of the documents, global.
        rank, size: of the context-parallel group.
    """
    start = 0
    for length in lengths:
        if size == 1:
            yield start, start + length, start, start + length
        else:
            if length % (2 * size):
                raise ValueError(f"a document of {length} tokens is not a multiple of 2 * {size} (context parallelism)")
            chunk = length // (2 * size)
            for place, index in enumerate((rank, 2 * size - 1 - rank)):
                first = start // size + place * chunk
                yield first, first + chunk, start, start + (index + 1) * chunk
        start += length


def gather_in_order(key: Tensor, value: Tensor, lengths: Sequence[int], group) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks of a context-parallel group, in the order of the text; the backward pass adds the
    ranks' gradients.

    Args:
        key, value: [t/cp, ...], this rank's chunks, document after document.
    """
    size = group.size()
    # One collective for both.
    both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=group)
    chunks = [length // (2 * size) for length in lengths for _ in range(2)]
    parts = both.split(chunks * size)
    owner_and_place = [(i, 0) for i in range(size)] + [(i, 1) for i in reversed(range(size))]
    ordered = [
        parts[owner * len(chunks) + 2 * document + place]
        for document in range(len(lengths))
        for owner, place in owner_and_place
    ]
    key, value = torch.cat(ordered).split((key.shape[-1], value.shape[-1]), dim=-1)
    return key, value


def take_chunks(x: Tensor, lengths: Sequence[int], rank: int, size: int) -> Tensor:
    """This rank's part of ``x`` [b, s, ...], in the order in which it holds it.

    Args:
        lengths: of the documents that each row holds, global; one sequence is one document.
    """
    if size == 1:
        return x
    # The last of a span's queries is the last of its keys.
    return torch.cat([x[:, end - (b - a) : end] for a, b, _, end in spans(lengths, rank, size)], dim=1)


def partitioned_indices(documents: Tensor, total_tokens: int, size: int, rank: int) -> Tensor:
    """Which tokens of a packed row a rank holds, in its order: int32 [total_tokens / size]. Called as Transformer
    Engine's ``thd_get_partitioned_indices`` is.

    Args:
        documents: int [documents + 1], where each begins and the last ends; lengths are multiples of ``2 * size``.
    """
    lengths = documents.diff().tolist()
    assert not any(length % (2 * size) for length in lengths), "documents that 2 * size chunks do not divide"
    row = torch.arange(total_tokens, dtype=torch.int32, device=documents.device)
    return take_chunks(row.unsqueeze(0), lengths, rank, size)[0]
