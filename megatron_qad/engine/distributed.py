"""Process groups for tools that run alone as well as under torchrun."""

import os

import torch


def init_process_group() -> None:
    """Join torchrun's group, or make one of this process alone. gloo: tools move files, not gradients."""
    if torch.distributed.is_initialized():
        return
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    else:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())


def rank_and_size() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
