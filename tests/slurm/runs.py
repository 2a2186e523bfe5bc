"""Reads the training history and the last checkpoint of a run, for comparison bit for bit."""

from pathlib import Path

import torch
from place import megatron


def history(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return all scalars that depend on the arithmetic, as TensorBoard's float32: not times and memory."""
    from megatron_qad.report.scalars import read_scalars

    prefixes = ("kl loss", "validation/", "learning-rate", "grad-norm")
    curves = read_scalars(run).items()
    return {name: curve for name, curve in curves if name.startswith(prefixes) and " vs " not in name}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the newest checkpoint: weights, input amaxes, master weights and optimizer moments."""
    with megatron():
        from megatron_qad.checkpoint.torch_dist import TorchDistReader

        reader = TorchDistReader(run)
        return reader.read(list(reader._files.names))


def iteration(log: Path) -> int:
    """Return the last training step in a log; 0 before the first."""
    lines = [line for line in log.read_text().splitlines() if " iteration " in line and "kl loss" in line]
    return int(lines[-1].split(" iteration ")[1].split("/")[0]) if lines else 0
