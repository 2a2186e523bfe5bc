"""What a run has left: the numbers of its history and the tensors of its last checkpoint, for comparison bit by bit."""

from pathlib import Path

import torch
from place import megatron


def history(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every number that depends on the arithmetic, as TensorBoard's float32; times and memory left out."""
    from megatron_qad.report.scalars import read_scalars

    wanted = ("kl loss", "validation/", "learning-rate", "grad-norm")
    return {name: curve for name, curve in read_scalars(run).items() if name.startswith(wanted) and " vs " not in name}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint: weights, input amaxes, masters and both moments of the optimizer."""
    with megatron():
        from megatron_qad.checkpoint.torch_dist import TorchDistReader

        reader = TorchDistReader(run)
        return reader.read(list(reader._metadata))


def iteration(log: Path) -> int:
    """The last training step that a log tells of; 0 before the first."""
    lines = [line for line in log.read_text().splitlines() if " iteration " in line and "kl loss" in line]
    return int(lines[-1].split(" iteration ")[1].split("/")[0]) if lines else 0
