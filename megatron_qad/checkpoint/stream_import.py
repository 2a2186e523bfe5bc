"""Writes an imported model as a checkpoint, in parts: files of consecutive tensors, which ``stream_release`` continues.

``import_hf`` and ``import_megatron`` differ in how they read a tensor; what they write is the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

import torch

import megatron_qad
from megatron_qad.checkpoint.stream_release import stream_release
from megatron_qad.checkpoint.worker_pool import default_num_workers
from megatron_qad.models.families.base import ParamMapping

PART_BYTES, _MAX_PARTS = 512 << 20, 1024


def stream_import(
    target: Path,
    maps: Sequence[ParamMapping],
    dtype: torch.dtype,
    *,
    convert: Callable[[ParamMapping], Iterable[tuple[str, torch.Tensor]]],
    finish: Callable[[Path], None],
    record: dict,
    num_workers: int | None,
    part_bytes: int,
) -> None:
    """Write the tensors ``maps`` to the checkpoint ``target``. Every rank calls this with the same arguments.

    Args:
        target, convert, finish: as in ``stream_release``.
        dtype: dtype of the stored weights.
        record: provenance of the import. Together with the parts it decides whether a partial directory is continued.
        num_workers: worker processes of this rank. None: one for each core.
        part_bytes: see ``divide``.

    Raises:
        QADError: as in ``stream_release``.
    """
    parts = divide(maps, dtype, part_bytes)
    stream_release(
        target,
        parts=[[(m, num_bytes(m, dtype)) for m in part] for part in parts],
        convert=convert,
        finish=finish,
        job={"import": record, "parts": [len(part) for part in parts], "version": megatron_qad.__version__},
        num_workers=num_workers or default_num_workers(),
    )


def stored_dtype(tensor_map: ParamMapping, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a tensor in a checkpoint whose weights are imported in ``dtype``."""
    return torch.float32 if tensor_map.is_float32 else dtype


def num_bytes(tensor_map: ParamMapping, dtype: torch.dtype) -> int:
    """Return the size of a tensor in a checkpoint whose weights are imported in ``dtype``."""
    return prod(tensor_map.shape) * stored_dtype(tensor_map, dtype).itemsize


def divide(maps: Sequence[ParamMapping], dtype: torch.dtype, part_bytes: int = PART_BYTES) -> list[list[ParamMapping]]:
    """Divide tensors into parts of at least ``part_bytes``. All ranks and a later run get the same parts."""
    part_bytes = max(part_bytes, sum(num_bytes(m, dtype) for m in maps) // _MAX_PARTS)
    parts: list[list[ParamMapping]] = []
    size = part_bytes
    for tensor_map in maps:
        if size >= part_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor_map)
        size += num_bytes(tensor_map, dtype)
    return parts


def stored_parts(tensor_map: ParamMapping, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parts in which Megatron stores a tensor, with their names."""
    rows = tensor_map.checkpoint_splits
    for ending, part in zip(rows, tensor.split(tuple(rows.values())), strict=True):
        # Cloned, because torch.save writes all of a view's storage.
        yield tensor_map.megatron + ending, part if len(rows) == 1 else part.clone()
