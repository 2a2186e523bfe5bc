"""Process groups for tools that run alone as well as under torchrun, and checks whose result all ranks share."""

import os
from collections.abc import Callable

import torch

from megatron_qad.engine.entry_point import describe
from megatron_qad.engine.errors import QADError


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


def on_every_rank[T](work: Callable[[int, int], T]) -> list[T]:
    """Run ``work(rank, number of ranks)`` on every rank and return the results of all, by rank. Collective.

    Without a process group, ``work(0, 1)`` runs here alone.

    Raises:
        QADError: ``work`` raised a QADError or an OSError on some rank; every rank raises that of the first such rank.
    """
    is_alone = not torch.distributed.is_initialized()
    rank, size = (0, 1) if is_alone else rank_and_size()
    result = problem = None
    try:
        result = work(rank, size)
    except QADError as error:
        problem = str(error)
    except OSError as error:
        problem = describe(error)
    outcomes = [(result, problem)] * size
    if not is_alone:
        torch.distributed.all_gather_object(outcomes, (result, problem))
    for _, problem in outcomes:
        if problem is not None:
            raise QADError(problem)
    return [result for result, _ in outcomes]
