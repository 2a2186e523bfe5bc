"""Reads what ``training_jobs._Watch`` wrote: each step's numbers, and tensors put together from their shards."""

from pathlib import Path

import torch
from torch import Tensor


def read(record: Path, num_ranks: int, *, vocab_size: int, whole: bool = True) -> list[dict]:
    """One dict a step: "loss" by name, "grad_norm", "batches" and "amaxes" of the first rank; as whole tensors "grads"
    (after all reductions), "quantized" (parameters during the step), "params" and "masters" (after it). Without
    ``whole`` no tensors: data-parallel ranks hold parts of them."""
    ranks = [torch.load(f"{record}.rank{rank}") for rank in range(num_ranks)]
    steps = []
    for parts in zip(*ranks, strict=True):
        losses = [part["loss"] for part in parts if part["loss"]]
        assert all(loss == losses[0] for loss in losses)
        assert len({part["grad_norm"] for part in parts}) == 1
        step = {"loss": losses[0]} | {what: parts[0][what] for what in ("grad_norm", "batches", "amaxes")}
        for what in ("grads", "params", "masters", "quantized") if whole else ():
            step[what] = _whole([part[what] for part in parts], vocab_size)
        steps.append(step)
    return steps


def _whole(ranks: list[dict], vocab_size: int) -> dict[str, Tensor]:
    found = {}
    for name in {name for rank in ranks for name in rank}:
        copies = [rank[name] for rank in ranks if name in rank]
        first, axis, rows, _ = copies[0]
        shards: dict[int, Tensor] = {}
        for tensor, _, _, tp_rank in copies:
            place = 0 if axis is None else tp_rank
            # Data-parallel ranks, a tied embedding's two stages and uncut tensors: copies that must be the same.
            first = shards.setdefault(place, tensor)
            assert first is tensor or torch.equal(first, tensor), name  # NaN is not equal to itself
        tensors = [shards[place] for place in sorted(shards)]
        if axis is None:
            whole = tensors[0]
        else:
            parts = [tensor.split(rows or first.shape[axis], dim=axis) for tensor in tensors]
            whole = torch.cat([shard for part in zip(*parts, strict=True) for shard in part], dim=axis)
        is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        found[name] = whole[:vocab_size] if is_vocabulary else whole
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=torch.finfo(torch.float64).tiny)).item()


def largest_error(found: list[dict], expected: list[dict], what: str) -> tuple[float, str]:
    """The largest ``relative_error`` over all steps and tensors, and where it is."""
    errors = []
    for number, (a, b) in enumerate(zip(found, expected, strict=True), 1):
        assert a[what].keys() == b[what].keys()
        errors += [(relative_error(a[what][name], b[what][name]), f"step {number}, {name}") for name in b[what]]
    return max(errors)
