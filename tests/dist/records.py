"""Reads the records of ``training_jobs._Watch``: the numbers of each step, and tensors assembled from their shards."""

from pathlib import Path

import torch
from torch import Tensor


def read(record: Path, num_ranks: int, *, vocab_size: int, whole: bool = True) -> list[dict]:
    """Return one dict per step: "loss" by name, "grad_norm", and "batches" and "amaxes" of the first rank. With
    ``whole`` also assembled tensors: "grads" (after all reductions), "quantized" (parameters during the step), "params"
    and "masters" (after the step). Use False if data-parallel ranks hold shards of them."""
    ranks = [torch.load(f"{record}.rank{rank}") for rank in range(num_ranks)]
    steps = []
    for parts in zip(*ranks, strict=True):
        losses = [part["loss"] for part in parts if part["loss"]]
        assert all(loss == losses[0] for loss in losses)
        assert len({part["grad_norm"] for part in parts}) == 1
        step = {"loss": losses[0]} | {what: parts[0][what] for what in ("grad_norm", "batches", "amaxes")}
        for what in ("grads", "params", "masters", "quantized") if whole else ():
            step[what] = _assemble([part[what] for part in parts], vocab_size)
        steps.append(step)
    return steps


def _assemble(ranks: list[dict], vocab_size: int) -> dict[str, Tensor]:
    tensors_by_name = {}
    for name in {name for rank in ranks for name in rank}:
        copies = [rank[name] for rank in ranks if name in rank]
        first, axis, rows, _ = copies[0]
        shards: dict[int, Tensor] = {}
        for tensor, _, _, tp_rank in copies:
            place = 0 if axis is None else tp_rank
            # Data-parallel ranks, both stages of a tied embedding and replicated tensors hold equal copies.
            first = shards.setdefault(place, tensor)
            assert first is tensor or torch.equal(first, tensor), name  # NaN is not equal to itself
        tensors = [shards[place] for place in sorted(shards)]
        if axis is None:
            whole = tensors[0]
        else:
            parts = [tensor.split(rows or first.shape[axis], dim=axis) for tensor in tensors]
            whole = torch.cat([shard for part in zip(*parts, strict=True) for shard in part], dim=axis)
        is_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        tensors_by_name[name] = whole[:vocab_size] if is_vocabulary else whole
    return tensors_by_name


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference divided by the norm of ``expected``, in float64."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=torch.finfo(torch.float64).tiny)).item()


def largest_error(actual: list[dict], expected: list[dict], what: str) -> tuple[float, str]:
    """Return the largest ``relative_error`` over all steps and tensors, and the step and name where it occurs."""
    errors = []
    for number, (a, b) in enumerate(zip(actual, expected, strict=True), 1):
        assert a[what].keys() == b[what].keys()
        errors += [(relative_error(a[what][name], b[what][name]), f"step {number}, {name}") for name in b[what]]
    return max(errors)
