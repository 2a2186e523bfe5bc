"""Memory of the activations over a step: which microbatches a pipeline rank holds at a time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_qad.config.parallelism import split_into_stages
from megatron_qad.planning.activations import (
    Kernels,
    Saved,
    embedding_bytes,
    final_norm_bytes,
    saved_by_layers,
)
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout


@dataclass(frozen=True)
class ChunkBytes:
    """Bytes of one microbatch in one model chunk of a rank."""

    kept: int
    """From its forward to its backward pass."""
    in_backward: int
    """Largest number during its backward pass, which releases the last layer first."""


def activation_bytes(model: PlannedModel, layout: Layout, kernels: Kernels) -> list[int]:
    """Return the largest number of bytes that each pipeline rank keeps for backward passes at a time.

    The output layer and the loss are not counted.
    """
    saved = saved_by_layers(model, layout, kernels)
    stages = split_into_stages(model.pattern, layout.pp * layout.vpp).split("|")
    chunks, start = [], 0
    for index, stage in enumerate(stages):
        parts = _with_full_recomputation(saved[start : start + len(stage)], model, layout)
        if index == 0:
            parts = [Saved(embedding_bytes(layout)), *parts]
        if index == len(stages) - 1:
            parts = [*parts, Saved(final_norm_bytes(model, layout, kernels))]
        chunks.append(_chunk(parts))
        start += len(stage)
    return [_peak(chunks[rank :: layout.pp], layout, rank) for rank in range(layout.pp)]


def _with_full_recomputation(layers: Sequence[Saved], model: PlannedModel, layout: Layout) -> list[Saved]:
    """Return the layers, or the groups of layers that run again together, which keep only their input."""
    if layout.recompute != "full":
        return list(layers)
    size, end = layout.recompute_layers, len(layers)
    if layout.recompute_block:
        size, end = 1, min(layout.recompute_layers, len(layers))
    one_input = layout.sharded_tokens * model.hidden_size * layout.element_bytes
    groups = [layers[i : min(i + size, end)] for i in range(0, end, size)]
    return [*(Saved(one_input, sum(layer.kept for layer in group)) for group in groups), *layers[end:]]


def _chunk(parts: Sequence[Saved]) -> ChunkBytes:
    totals = list(itertools.accumulate(part.kept for part in parts))
    return ChunkBytes(totals[-1], max(total + part.recomputed for total, part in zip(totals, parts, strict=True)))


def _peak(chunks: Sequence[ChunkBytes], layout: Layout, rank: int) -> int:
    now = peak = 0
    for is_forward, index in passes(layout, rank):
        chunk = chunks[index]
        if is_forward:
            now += chunk.kept
            peak = max(peak, now)
        else:
            now -= chunk.kept
            peak = max(peak, now + chunk.in_backward)
    return peak


def passes(layout: Layout, rank: int) -> Iterator[tuple[bool, int]]:
    """Yield the passes of a pipeline rank in order, as (is a forward pass, chunk): Megatron's 1F1B schedules.

    Source: ``megatron.core.pipeline_parallel.schedules`` (``get_pp_rank_microbatches``, ``get_schedule_table``).
    """
    pp, vpp, num = layout.pp, layout.vpp, layout.num_microbatches
    total = num * vpp
    if vpp > 1:
        warmup = 2 * (pp - rank - 1) + (vpp - 1) * pp
    else:
        warmup = pp - rank - 1
    warmup = min(warmup, total)
    # With virtual stages, each group of pp microbatches passes through all chunks before the next group.
    order = [chunk for first in range(0, num, pp) for chunk in range(vpp) for _ in range(min(pp, num - first))]
    for k in range(warmup):
        yield True, order[k]
    for k in range(warmup, total):
        yield True, order[k]
        yield False, vpp - 1 - order[k - warmup]
    for k in range(total - warmup, total):
        yield False, vpp - 1 - order[k]
