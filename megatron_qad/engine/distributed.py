"""Process groups for tools that run alone as well as under torchrun."""

import os

import torch


def init_process_group() -> None:
    """Join torchrun's process group, or create a group of this process alone. gloo is enough: tools only move files."""
    if torch.distributed.is_initialized():
        return
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    else:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
