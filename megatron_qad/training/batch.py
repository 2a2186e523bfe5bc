"""A microbatch, read once and given to teacher and student alike.

Only the first tensor-parallel rank of the first and last pipeline stage has a data iterator. One broadcast a schedule
carries all its microbatches to the other ranks of the tensor-parallel group; stages in between need none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import mpu
from megatron.training import get_args
from torch import Tensor


@dataclass
class Batch:
    """One microbatch on this rank's device; all int64 [b, s] but the mask."""

    tokens: Tensor | None = None
    position_ids: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    """float32 [b, s], the weight of each label; 0 leaves it out."""
    teacher_logits: Tensor | None = None
    """[b, s, V/tp], on the last stage, once the teacher's pass has filled it."""


def read_batches(data_iterator, num_microbatches: int, micro_batch_size: int, seq_length: int) -> list[Batch]:
    """The next microbatches of this rank, in order.

    Args:
        data_iterator: Megatron's: an iterator, a list of them (one a virtual stage), or None where there is no data.
    """
    if not (mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)):
        return [Batch() for _ in range(num_microbatches)]
    shape = (num_microbatches, 4, micro_batch_size, seq_length)
    group = mpu.get_tensor_model_parallel_group()
    if group.rank() == 0:
        iterator = _first_with_data(data_iterator)
        packed = torch.stack([_pack(next(iterator)) for _ in range(num_microbatches)])
        assert packed.shape == shape, f"microbatches are {list(packed.shape)}, expected {list(shape)}"
        packed = packed.cuda(non_blocking=True)
    else:
        packed = torch.empty(shape, dtype=torch.int64, device=torch.cuda.current_device())
    if group.size() > 1:
        torch.distributed.broadcast(packed, torch.distributed.get_global_rank(group, 0), group=group)
    return [_unpack(part) for part in packed]


def logits_of(model: torch.nn.Module, batch: Batch) -> Tensor:
    """A forward pass: logits [b, s, V/tp] on the last stage, hidden states on the others.

    In the model's precision: Megatron's mixed-precision wrapper would make a float32 copy of all logits.
    """
    keep_precision = {"fp32_output": False} if get_args().bf16 else {}
    return model(batch.tokens, batch.position_ids, None, **keep_precision)


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


def _pack(sample: dict) -> Tensor:
    """One int64 tensor [4, b, s]: the mask's float32 bits travel as integers."""
    mask = sample["loss_mask"].float().contiguous().view(torch.int32).long()
    return torch.stack((sample["tokens"].long(), sample["position_ids"].long(), sample["labels"].long(), mask))


def _unpack(packed: Tensor) -> Batch:
    tokens, position_ids, labels, mask = packed
    return Batch(tokens, position_ids, labels, mask.int().view(torch.float32))
