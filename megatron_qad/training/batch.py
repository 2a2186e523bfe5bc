"""A microbatch: read once, given to teacher and student alike, and run through a model.

Only the first tensor-parallel rank of the first and last pipeline stage has a data iterator. One broadcast a schedule
carries all its microbatches to the other ranks of the tensor-parallel group; stages in between need none, only where
documents end in packed rows. Each context-parallel rank reads whole rows and keeps its chunks of them.

Packed rows (``--dataloader-inter-document-masking``) of a microbatch become one row of all their documents.
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
    """One microbatch on this rank's device; all int64 [b, s/cp] but the mask. Packed: [1, b * s/cp]."""

    tokens: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    """float32 [b, s/cp], the weight of each label; 0 leaves it out."""
    documents: Documents | None = None
    """Where the documents of a packed row end; None: every row is one sequence."""
    teacher_output: ModelOutput | None = None
    """On the last stage, once the teacher's pass has filled it."""
    teacher_states: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Outputs of the teacher's layers on this rank, [s, b, H], that hidden-state losses are going to compare."""


def round_up_to_pipeline(number: int) -> int:
    """``number`` of microbatches, rounded up to whole rounds of the pipeline where virtual stages want them."""
    if mpu.get_virtual_pipeline_model_parallel_world_size() is None:
        return number
    num_stages = mpu.get_pipeline_model_parallel_world_size()
    return -(-number // num_stages) * num_stages


def num_calibration_batches(samples: int, micro_batch_size: int) -> int:
    """Microbatches of each rank for calibration with ``samples`` sequences: shared out over the data-parallel ranks, so
    that what is found does not depend on their number."""
    return round_up_to_pipeline(-(-samples // (micro_batch_size * mpu.get_data_parallel_world_size())))


@dataclass(frozen=True)
class BatchReader:
    """Reads the microbatches of one job.

    Args:
        is_packed: rows hold several documents.
        on_every_stage: pipeline stages in between get the data, too: some losses need the mask there.
    """

    is_packed: bool
    on_every_stage: bool = False

    def schedule_shape(self, *, seq_length: int, micro_batch_size: int, **rest) -> dict:
        """The schedule's arguments, with the rows of a packed microbatch as the one row that they become."""
        if self.is_packed:
            seq_length, micro_batch_size = seq_length * micro_batch_size, 1
        return {"seq_length": seq_length, "micro_batch_size": micro_batch_size, **rest}

    def read(self, data_iterator, num_microbatches: int, micro_batch_size: int, seq_length: int) -> list[Batch]:
        """The next microbatches of this rank, in order.

        Args:
            data_iterator: Megatron's: an iterator, a list of them (one a virtual stage), or None where there is no
                data.
            micro_batch_size, seq_length: rows of a microbatch and their global length, packed or not.
        """
        shape = (num_microbatches, 5 if self.is_packed else 4, micro_batch_size, seq_length)
        has_data = mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
        data = _read(data_iterator, shape, self.is_packed) if has_data else None
        if self.on_every_stage and mpu.get_pipeline_model_parallel_world_size() > 2:
            data, has_data = _from_first_stage(data if has_data else _empty(shape)), True
        if not self.is_packed:
            return [_unpack(part, None) for part in data] if has_data else [Batch() for _ in range(num_microbatches)]
        ends = data[:, -1].contiguous() if has_data else _empty((num_microbatches, micro_batch_size, seq_length))
        if mpu.get_pipeline_model_parallel_world_size() > 2:  # stages in between have no data, but attention
            ends = _from_first_stage(ends)
        documents = [Documents.from_lengths(_lengths(rows), ends.device) for rows in ends.tolist()]
        if not has_data:
            return [Batch(documents=found) for found in documents]
        return [_unpack(part[:-1], found) for part, found in zip(data, documents, strict=True)]


_INTEGERS = ("tokens", "position_ids", "labels")


def _read(data_iterator, shape: tuple[int, ...], is_packed: bool) -> Tensor:
    """int64 ``shape`` [m, kinds, b, s] on all tensor-parallel ranks, from the data of the first."""
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


def _from_first_stage(data: Tensor) -> Tensor:
    group = mpu.get_pipeline_model_parallel_group()
    torch.distributed.broadcast(data, torch.distributed.get_global_rank(group, 0), group=group)
    return data


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=torch.cuda.current_device())


def _lengths(rows: list[list[int]]) -> list[int]:
    """Lengths of the documents of some rows, in order. A row lists its documents' ends, the last again and again."""
    found = []
    for row in rows:
        ends = row[: row.index(len(row)) + 1]
        found += [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return found


class ForwardPass:
    """Forward passes of a job's models, and which microbatch is in one.

    Args:
        keeps_precision: outputs are in the model's precision: Megatron's mixed-precision wrapper, which there is for
            16-bit models, would make a float32 copy of all logits.
    """

    def __init__(self, keeps_precision: bool):
        self._options = {"fp32_output": False} if keeps_precision else {}
        self._running: list[Batch] = []

    def __call__(self, model: torch.nn.Module, batch: Batch, *, hidden: bool = False) -> Tensor:
        """On the last stage logits [b, s, V/tp], or with ``hidden`` its final hidden states (see
        ``models.output_layer``), hidden states on the others."""
        with self.running(batch), stopped_before_output_layer(model) if hidden else nullcontext():
            return model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.documents, **self._options)

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Inside, ``batch`` is what a forward pass of layers is about."""
        self._running.append(batch)
        try:
            yield
        finally:
            self._running.pop()

    @property
    def batch(self) -> Batch:
        """The one that is running, for hooks on layers, which are not told."""
        return self._running[-1]


def join(batches: Sequence[Batch]) -> Batch:
    """Several microbatches as one, for a forward pass without a loss; packed rows become one longer row."""
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
    """Iterators over ``batches`` in the form of the schedule's ``data_iterator``: each virtual stage reads all of
    them."""
    if isinstance(data_iterator, list):
        return [iter(batches) for _ in data_iterator]
    return iter(batches)


def _first_with_data(data_iterator) -> Iterator:
    if isinstance(data_iterator, list):
        return next(iterator for iterator in data_iterator if iterator is not None)
    return data_iterator


def _pack(sample: dict, is_packed: bool) -> Tensor:
    """One int64 tensor [4 or 5, b, s]: the mask's float32 bits travel as integers."""
    mask = sample["loss_mask"].float().contiguous().view(torch.int32).long()
    parts = [*(sample[name].long() for name in _INTEGERS), mask]
    if is_packed:
        parts.append(sample["cu_seqlens"][:, 1:].long())
    return torch.stack(parts)


def _unpack(data: Tensor, documents: Documents | None) -> Batch:
    """This context-parallel rank's part of a microbatch, int64 [4, b, s]."""
    group = mpu.get_context_parallel_group()
    lengths = [data.shape[-1]]
    if documents is not None:
        data, lengths = data.flatten(1).unsqueeze(1), documents.document_lengths
    parts = data if group.size() == 1 else (take_chunks(p, lengths, group.rank(), group.size()) for p in data)
    tokens, position_ids, labels, mask = (part.contiguous() for part in parts)
    return Batch(tokens, position_ids, labels, mask.int().view(torch.float32), documents)
