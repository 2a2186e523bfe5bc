"""Microbatches: reads them once for both teacher and student, and runs them through a model.

Only the first tensor-parallel rank of the first and of the last pipeline stage has a data iterator. One broadcast per
schedule sends all its microbatches to the other ranks of the tensor-parallel group. Middle stages need no data, except
the document ends of packed rows. Each context-parallel rank reads complete rows and keeps its chunks of them.

Packed rows (``--dataloader-inter-document-masking``) of a microbatch are joined into one row of all their documents.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from megatron.core import mpu
from torch import Tensor

from megatron_qad.models.context_parallel import Documents, take_chunks
from megatron_qad.models.output_layer import ModelOutput, stopped_before_output_layer


@dataclass
class Batch:
    """One microbatch on this rank's device. Tensors are int64 [b, s/cp] unless noted; packed: [1, b * s/cp].

    Example::

        tokens = torch.tensor([[5, 7, 9]])
        batch = Batch(tokens, position_ids=torch.arange(3)[None])
        output = job.forward(model, batch)  # a ForwardPass; returns logits [1, 3, V/tp] on the last stage
    """

    tokens: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    """float32 [b, s/cp], weight of each label in the loss; 0 excludes it."""
    documents: Documents | None = None
    """Ends of the documents in a packed row. None means that each row is one sequence."""
    teacher_output: ModelOutput | None = None
    """Output of the teacher on the last stage, set by the teacher's pass and removed by the loss."""
    teacher_states: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Outputs of the teacher's layers on this rank, [s, b, H], for hidden-state losses."""


def round_up_to_pipeline(num_microbatches: int) -> int:
    """Round a number of microbatches up to a multiple of the pipeline size if there are virtual stages."""
    if mpu.get_virtual_pipeline_model_parallel_world_size() is None:
        return num_microbatches
    num_stages = mpu.get_pipeline_model_parallel_world_size()
    return -(-num_microbatches // num_stages) * num_stages


def num_calibration_batches(samples: int, micro_batch_size: int) -> int:
    """Return the microbatches per rank that calibrate with ``samples`` sequences, divided among data-parallel ranks.

    The total, and so the result of the calibration, does not depend on the number of ranks.
    """
    return round_up_to_pipeline(-(-samples // (micro_batch_size * mpu.get_data_parallel_world_size())))


@dataclass(frozen=True)
class BatchReader:
    """Reads the microbatches of one job.

    Args:
        is_packed: rows hold several documents.
        on_every_stage: middle pipeline stages get the data, too, because some losses need the mask there.
    """

    is_packed: bool
    on_every_stage: bool = False

    def schedule_shape(self, *, seq_length: int, micro_batch_size: int, **kwargs) -> dict:
        """Return the schedule's shape arguments; the rows of a packed microbatch count as one joined row."""
        if self.is_packed:
            seq_length, micro_batch_size = seq_length * micro_batch_size, 1
        return {"seq_length": seq_length, "micro_batch_size": micro_batch_size, **kwargs}

    def read(self, data_iterator, num_microbatches: int, micro_batch_size: int, seq_length: int) -> list[Batch]:
        """Read the next microbatches of this rank, in order.

        Args:
            data_iterator: Megatron's iterator, a list of iterators (one per virtual stage), or None on ranks without
                data.
            micro_batch_size: rows per microbatch, before packed rows are joined.
            seq_length: tokens per row over all context-parallel ranks.
        """
        shape = (num_microbatches, 5 if self.is_packed else 4, micro_batch_size, seq_length)
        has_data = mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
        data = _read(data_iterator, shape, self.is_packed) if has_data else None
        if self.on_every_stage and mpu.get_pipeline_model_parallel_world_size() > 2:
            data, has_data = _broadcast_from_first_stage(data if has_data else _empty(shape)), True
        if not self.is_packed:
            return [_unpack(part, None) for part in data] if has_data else [Batch() for _ in range(num_microbatches)]
        ends = data[:, -1].contiguous() if has_data else _empty((num_microbatches, micro_batch_size, seq_length))
        if mpu.get_pipeline_model_parallel_world_size() > 2:  # middle stages have no data, but need document ends
            ends = _broadcast_from_first_stage(ends)
        documents = [Documents.from_lengths(_document_lengths(rows), ends.device) for rows in ends.tolist()]
        if not has_data:
            return [Batch(documents=row_documents) for row_documents in documents]
        return [_unpack(part[:-1], row_documents) for part, row_documents in zip(data, documents, strict=True)]


_INTEGERS = ("tokens", "position_ids", "labels")


def _read(data_iterator, shape: tuple[int, ...], is_packed: bool) -> Tensor:
    """Return int64 [m, kinds, b, s] on all tensor-parallel ranks, read by the first of them."""
    group = mpu.get_tensor_model_parallel_group()
    if group.rank() == 0:
        iterator = _first_with_data(data_iterator)
        packed = torch.stack([_pack(next(iterator), is_packed) for _ in range(shape[0])])
        assert packed.shape == shape, f"microbatches are {list(packed.shape)}, expected {list(shape)}"
        packed = packed.cuda(non_blocking=True)
    else:
        packed = _empty(shape)
    if group.size() > 1:
        torch.distributed.broadcast(packed, torch.distributed.get_global_rank(group, 0), group=group)
    return packed


def _broadcast_from_first_stage(data: Tensor) -> Tensor:
    group = mpu.get_pipeline_model_parallel_group()
    torch.distributed.broadcast(data, torch.distributed.get_global_rank(group, 0), group=group)
    return data


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=torch.cuda.current_device())


def _document_lengths(rows: list[list[int]]) -> list[int]:
    """Return the lengths of the documents of all rows, in order. A row holds document ends, padded with the last."""
    lengths = []
    for row in rows:
        ends = row[: row.index(len(row)) + 1]
        lengths += [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return lengths


class ForwardPass:
    """Runs forward passes of a job's models, and keeps track of the microbatch that is running.

    Args:
        keeps_precision: return outputs in the model's precision. Megatron's wrapper for 16-bit models would otherwise
            make a float32 copy of all logits.
    """

    def __init__(self, keeps_precision: bool):
        self._options = {"fp32_output": False} if keeps_precision else {}
        self._running: list[Batch] = []

    def __call__(self, model: torch.nn.Module, batch: Batch, *, hidden: bool = False) -> Tensor:
        """Run a model on a microbatch.

        Returns logits [b, s, V/tp] on the last stage, or its final hidden states if ``hidden`` (see
        ``models.output_layer``). Other stages return the hidden states for the next stage.
        """
        with self.running(batch), stopped_before_output_layer(model) if hidden else nullcontext():
            return model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.documents, **self._options)

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Context manager: ``batch`` is the microbatch of the layers' forward passes inside."""
        self._running.append(batch)
        try:
            yield
        finally:
            self._running.pop()

    @property
    def batch(self) -> Batch:
        """The microbatch being processed, for hooks on layers."""
        return self._running[-1]


def join(batches: Sequence[Batch]) -> Batch:
    """Join several microbatches into one, for a forward pass without a loss; packed rows become one longer row."""
    if len(batches) == 1:
        return batches[0]
    documents = batches[0].documents
    if documents is not None:
        lengths = [length for batch in batches for length in batch.documents.document_lengths]
        documents = Documents.from_lengths(lengths, documents.cu_seqlens_q.device)
    if batches[0].tokens is None:
        return Batch(documents=documents)
    dim = 0 if documents is None else 1
    tokens, position_ids = (torch.cat([getattr(b, n) for b in batches], dim) for n in ("tokens", "position_ids"))
    return Batch(tokens, position_ids, documents=documents)


def iterators(batches: Sequence[Batch], data_iterator) -> Iterator[Batch] | list[Iterator[Batch]]:
    """Return ``batches`` in the form of the schedule's ``data_iterator``: an iterator, or one per virtual stage."""
    if isinstance(data_iterator, list):
        return [iter(batches) for _ in data_iterator]
    return iter(batches)


def _first_with_data(data_iterator) -> Iterator:
    if isinstance(data_iterator, list):
        return next(iterator for iterator in data_iterator if iterator is not None)
    return data_iterator


def _pack(sample: dict, is_packed: bool) -> Tensor:
    """Pack a sample into one int64 tensor [4 or 5, b, s], with the float32 bits of the mask as integers."""
    mask = sample["loss_mask"].float().contiguous().view(torch.int32).long()
    parts = [*(sample[name].long() for name in _INTEGERS), mask]
    if is_packed:
        parts.append(sample["cu_seqlens"][:, 1:].long())
    return torch.stack(parts)


def _unpack(data: Tensor, documents: Documents | None) -> Batch:
    """Return this context-parallel rank's part of a microbatch from int64 [4, b, s]."""
    group = mpu.get_context_parallel_group()
    lengths = [data.shape[-1]]
    if documents is not None:
        data, lengths = data.flatten(1).unsqueeze(1), documents.document_lengths
    parts = data if group.size() == 1 else (take_chunks(p, lengths, group.rank(), group.size()) for p in data)
    tokens, position_ids, labels, mask = (part.contiguous() for part in parts)
    return Batch(tokens, position_ids, labels, mask.int().view(torch.float32), documents)
