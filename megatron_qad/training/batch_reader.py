"""Reads the microbatches of a job once, for both teacher and student.

Only the first tensor-parallel rank of the first and of the last pipeline stage has a data iterator. One broadcast per
schedule sends all its microbatches to the other ranks of the tensor-parallel group. Middle stages need no data, except
the document ends of packed rows. Each context-parallel rank reads complete rows and keeps its chunks of them. The
images of vision-language data are on the first stage only.

Packed rows (``--dataloader-inter-document-masking``) of a microbatch are joined into one row of all their documents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import mpu
from torch import Tensor

from megatron_qad.models.context_parallel import Documents, take_chunks
from megatron_qad.training.batch import Batch
from megatron_qad.training.image_features import ImageEncoder, MicrobatchImages


@dataclass(frozen=True)
class BatchReader:
    """Reads the microbatches of one job.

    Args:
        is_packed: rows hold several documents.
        on_every_stage: middle pipeline stages get the data, too, because some losses need the mask there.
        encoder: computes the features of images. None: the data has none.
    """

    is_packed: bool
    on_every_stage: bool = False
    encoder: ImageEncoder | None = None

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
        num_kinds = 4 + (self.encoder is not None) + self.is_packed
        shape = (num_microbatches, num_kinds, micro_batch_size, seq_length)
        has_data = mpu.is_pipeline_first_stage(ignore_virtual=True) or mpu.is_pipeline_last_stage(ignore_virtual=True)
        data, tiles = self._read(data_iterator, shape) if has_data else (None, [None] * num_microbatches)
        if self.on_every_stage and mpu.get_pipeline_model_parallel_world_size() > 2:
            data, has_data = _broadcast_from_first_stage(data if has_data else _empty(shape)), True
        documents: list[Documents | None] = [None] * num_microbatches
        if self.is_packed:
            ends = data[:, -1].contiguous() if has_data else _empty((num_microbatches, micro_batch_size, seq_length))
            if mpu.get_pipeline_model_parallel_world_size() > 2:  # middle stages have no data, but need document ends
                ends = _broadcast_from_first_stage(ends)
            documents = [Documents.from_lengths(_document_lengths(rows), ends.device) for rows in ends.tolist()]
        if not has_data:
            return [Batch(documents=row_documents) for row_documents in documents]
        return self._unpack(data[:, :-1] if self.is_packed else data, documents, tiles)

    def _read(self, data_iterator, shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """Return int64 [m, kinds, b, s] and the tiles of each microbatch on all tensor-parallel ranks, read by the
        first of them. Only the first stage gets tiles."""
        group = mpu.get_tensor_model_parallel_group()
        samples = []
        if group.rank() == 0:
            iterator = _first_with_data(data_iterator)
            samples = [next(iterator) for _ in range(shape[0])]
            packed = self._pack(samples)
            assert packed.shape == shape, f"microbatches are {list(packed.shape)}, expected {list(shape)}"
            packed = packed.cuda(non_blocking=True)
        else:
            packed = _empty(shape)
        if group.size() > 1:
            _broadcast(packed, group)
        if self.encoder is None or not mpu.is_pipeline_first_stage(ignore_virtual=True):
            return packed, [None] * shape[0]
        return packed, share_tiles(samples, shape[0], self.encoder.settings.tile_size, group)

    def _pack(self, samples: Sequence[dict]) -> Tensor:
        """Pack samples into one int64 tensor [m, kinds, b, s], with the float32 bits of the mask as integers."""
        rows = []
        for sample in samples:
            mask = sample["loss_mask"].float().contiguous().view(torch.int32)
            parts = [*[sample[name] for name in _INTEGERS], mask]
            if self.encoder is not None:
                counts, index = sample["tiles"].counts, sample["feature_index"].long()
                first = (counts.cumsum(0) - counts).unsqueeze(-1) * self.encoder.settings.tokens_per_tile
                parts.append(torch.where(index >= 0, index + first, index))  # among all features of the microbatch
            if self.is_packed:
                parts.append(sample["cu_seqlens"][:, 1:])
            rows.append(torch.stack([part.long() for part in parts]))
        return torch.stack(rows)

    def _unpack(
        self, data: Tensor, documents: Sequence[Documents | None], tiles: Sequence[Tensor | None]
    ) -> list[Batch]:
        """Return this context-parallel rank's parts of the microbatches in int64 [m, 4 or 5, b, s]."""
        group, batches = mpu.get_context_parallel_group(), []
        for part, row_documents, row_tiles in zip(data, documents, tiles, strict=True):
            lengths = [part.shape[-1]]
            if row_documents is not None:
                part, lengths = part.flatten(1).unsqueeze(1), row_documents.document_lengths
            if self.encoder is not None:
                part = torch.cat([part, _after_image(part[-1], lengths).unsqueeze(0)])
            if group.size() > 1:
                part = torch.stack([take_chunks(kind, lengths, group.rank(), group.size()) for kind in part])
            tokens, position_ids, labels, mask, *about_images = [kind.contiguous() for kind in part]
            batch = Batch(tokens, position_ids, labels, mask.int().view(torch.float32), row_documents)
            if about_images:
                feature_index, after_image = about_images
                batch.after_image = after_image.bool()
                batch.images = None if row_tiles is None else MicrobatchImages(self.encoder, row_tiles, feature_index)
            batches.append(batch)
        return batches


_INTEGERS = ("tokens", "position_ids", "labels")


def _broadcast(data: Tensor, group: torch.distributed.ProcessGroup) -> None:
    torch.distributed.broadcast(data, torch.distributed.get_global_rank(group, 0), group=group)


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


def _first_with_data(data_iterator) -> Iterator:
    if isinstance(data_iterator, list):
        return next(iterator for iterator in data_iterator if iterator is not None)
    return data_iterator


def _after_image(feature_index: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return int64 [b, s], 1 for the tokens in whose document an image comes before them or at their place.

    Args:
        lengths: of the documents in each row.
    """
    return torch.cat([(part >= 0).long().cummax(dim=1).values for part in feature_index.split(list(lengths), dim=1)], 1)


def share_tiles(
    samples: Sequence[dict], num_microbatches: int, tile_size: int, group: torch.distributed.ProcessGroup
) -> list[Tensor | None]:
    """Return the tiles of each microbatch, uint8 [n, 3, side, side], on all ranks of a group; None if it has none.

    Args:
        samples: the microbatches on the group's first rank, of which ``tiles`` is read; elsewhere they are not used.
    """
    counts = torch.zeros(num_microbatches, dtype=torch.int64, device=torch.cuda.current_device())
    if group.rank() == 0:
        counts.copy_(torch.tensor([len(sample["tiles"].pixels) for sample in samples]))
    if group.size() > 1:
        _broadcast(counts, group)
    sizes = counts.tolist()
    if not sum(sizes):
        return [None] * num_microbatches
    shape = (sum(sizes), 3, tile_size, tile_size)
    if group.rank() == 0:
        tiles = torch.cat([sample["tiles"].pixels for sample in samples]).cuda(non_blocking=True)
        assert tiles.shape == shape, f"tiles are {list(tiles.shape)}, expected {list(shape)}"
    else:
        tiles = torch.empty(shape, dtype=torch.uint8, device=torch.cuda.current_device())
    if group.size() > 1:
        _broadcast(tiles, group)
    return [part.clone() if len(part) else None for part in tiles.split(sizes)]
