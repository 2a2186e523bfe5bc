"""Reads and checks the environment variables with which a launcher starts the ranks, and a batch script the job."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine.distributed import check_not_one_of_several_tasks
from megatron_qad.engine.errors import QADError

_TORCHRUN = f"torchrun --nproc-per-node NUM_RANKS {sys.argv[0] or 'pretrain_qad.py'} ..."
_SCRIPT = f"launch/torchrun.sh {sys.argv[0] or 'pretrain_qad.py'} ..."


def world_size(flags: MegatronFlags, options: QADOptions, environ: Mapping[str, str]) -> int:
    """Return the number of ranks. A dry run without ``WORLD_SIZE`` assumes one model-parallel group.

    Raises:
        QADError: ``WORLD_SIZE`` is not a number, or this is one of several tasks of srun but not a rank.
    """
    size = _integer(environ, "WORLD_SIZE", 1)
    if not options.qad_dry_run:
        check_not_one_of_several_tasks(environ)
    if not options.qad_dry_run or "WORLD_SIZE" in environ:
        return size
    expert_tensor_parallel_size = flags.expert_tensor_parallel_size or flags.tensor_model_parallel_size
    return flags.pipeline_model_parallel_size * math.lcm(
        flags.tensor_model_parallel_size * flags.context_parallel_size,
        expert_tensor_parallel_size * flags.expert_model_parallel_size,
    )


def check_ranks(environ: Mapping[str, str]) -> None:
    """Check that a launcher has set all variables with which the ranks find each other.

    Raises:
        QADError: a variable is missing or contradicts another one.
    """
    rank, size = _integer(environ, "RANK", 0), _integer(environ, "WORLD_SIZE", 1)
    _integer(environ, "MASTER_PORT", 1)
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environ.get(name)]
    if len(missing) == len(names):
        raise QADError(
            f"the job was started without a launcher. Start it with {_SCRIPT} or {_TORCHRUN}, also for one rank."
        )
    if missing:
        found = ", ".join(f"{name}={environ[name]}" for name in names if name not in missing)
        raise QADError(
            f"{' and '.join(missing)}: not set, although {found} is. Start the ranks with a launcher that sets all of "
            f"them: {_TORCHRUN}"
        )
    if rank >= size:
        raise QADError(f"RANK={rank}: expected a rank below WORLD_SIZE={size}. Start the ranks with {_TORCHRUN}")
    local, on_node = _integer(environ, "LOCAL_RANK", 0), _integer(environ, "LOCAL_WORLD_SIZE", 1)
    if "LOCAL_WORLD_SIZE" in environ and local >= on_node:
        raise QADError(f"LOCAL_RANK={local}: expected a rank below LOCAL_WORLD_SIZE={on_node}.")
    if size > 1 and "LOCAL_RANK" not in environ:
        raise QADError(
            f"LOCAL_RANK: not set, so that all {size} ranks would use the first GPU of their node. Start the ranks "
            f"with {_TORCHRUN}"
        )


def job_dir(options: QADOptions, environ: Mapping[str, str]) -> Path | None:
    """Return the directory for messages between a batch script and the job; None if there is none."""
    directory = options.qad_job_dir or environ.get("QAD_JOB_DIR")
    if not directory:
        return None
    if not Path(directory).is_dir():
        raise QADError(
            f"--qad-job-dir {directory}: no such directory. The script that starts the job must create it first."
        )
    return Path(directory)


def _integer(environ: Mapping[str, str], name: str, lowest: int) -> int:
    text = environ.get(name) or str(lowest)
    if not text.isascii() or not text.isdigit() or int(text) < lowest:
        raise QADError(
            f"{name}={text}: expected a number of {lowest} or more. Start the ranks with {_TORCHRUN}, or unset it."
        )
    return int(text)
