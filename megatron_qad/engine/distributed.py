"""Process groups for tools that run alone as well as under torchrun, and checks whose result all ranks share."""

import errno
import os
import socket
from collections.abc import Callable, Mapping

import torch

from megatron_qad.engine.entry_point import describe
from megatron_qad.engine.errors import QADError


def init_process_group() -> None:
    """Join torchrun's process group, or create a group of this process alone. gloo is enough: tools only move files."""
    if torch.distributed.is_initialized():
        return
    check_not_one_of_several_tasks(os.environ)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    else:
        before = os.environ.get("GLOO_SOCKET_IFNAME")
        os.environ["GLOO_SOCKET_IFNAME"] = before or "lo"  # gloo listens although there is no other process
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        if before is None:
            del os.environ["GLOO_SOCKET_IFNAME"]  # a job on several nodes that this process starts must not inherit it


def check_not_one_of_several_tasks(environ: Mapping[str, str]) -> None:
    """Check that this process, if no launcher has made it a rank, is not one of several tasks that srun started.

    Each of them would run the whole job alone. A batch script has ``SLURM_NTASKS`` as well, but is not a step.

    Raises:
        QADError: it is one of several.
    """
    num_tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_STEP_ID" in environ and num_tasks != "1" and "RANK" not in environ:
        raise QADError(
            f"srun started {num_tasks} tasks, and without RANK each of them would be a job of its own. Put "
            "launch/srun.sh before the program, or use --ntasks 1."
        )


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def on_every_rank[T](work: Callable[[int, int], T]) -> list[T]:
    """Run ``work(rank, number of ranks)`` on every rank and return the results of all, by rank. Collective.

    Without a process group, ``work(0, 1)`` runs here alone.

    Raises:
        QADError: ``work`` raised a QADError or an OSError on some rank; every rank raises that of the first such rank.
    """
    if not torch.distributed.is_initialized():
        return [_unpack(_try(lambda: work(0, 1)))]
    rank, size = rank_and_size()
    outcomes = [None] * size
    torch.distributed.all_gather_object(outcomes, _try(lambda: work(rank, size)))
    failed = [outcome for outcome in outcomes if outcome[1] is not None]
    return [_unpack(outcome) for outcome in failed[:1] or outcomes]


def on_rank_0[T](work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result on every rank. Collective.

    Raises:
        QADError: ``work`` raised a QADError or an OSError; every rank raises it.
    """
    if not torch.distributed.is_initialized():
        return _unpack(_try(work))
    outcome = [_try(work) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(outcome, src=0)
    return _unpack(outcome[0])


def _try[T](work: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the result of ``work``, or the text of its error."""
    try:
        return work(), None
    except QADError as error:
        return None, str(error)
    except OSError as error:
        return None, describe(error)


def _unpack[T](outcome: tuple[T, str | None]) -> T:
    result, problem = outcome
    if problem is not None:
        raise QADError(problem)
    return result


def check_port_is_free(environ: Mapping[str, str]) -> None:
    """Check on the first rank that ``MASTER_PORT``, on which it will wait for the others, is free.

    Under torchrun the agent holds the port, and the ranks are its clients.

    Raises:
        QADError: another process uses the port.
    """
    if environ.get("RANK") != "0" or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = environ["MASTER_PORT"]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        try:
            probe.bind(("", int(port)))
        except OverflowError as error:
            raise QADError(f"MASTER_PORT={port}: expected a number up to 65535.") from error
        except OSError as error:
            problem = "is in use by another process" if error.errno == errno.EADDRINUSE else error.strerror
            raise QADError(
                f"MASTER_PORT={port}: {problem}. Choose another port (torchrun --master-port), or end that process."
            ) from error
