"""Starts commands as processes: in this interpreter, or as one rank for each GPU by ``launch/torchrun.sh``."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import megatron_qad
from megatron_qad.cli.command_table import COMMANDS
from megatron_qad.engine.errors import QADError

MODULE = "megatron_qad.cli"
"""What ``python -m`` and ``torchrun.sh -m`` run."""


def launch_directory() -> Path:
    """Return the directory of torchrun.sh and slurm.sbatch: in the installed package, or next to it in a checkout."""
    package = Path(megatron_qad.__file__).resolve().parent
    for directory in (package / "launch", package.parent / "launch"):
        if (directory / "torchrun.sh").is_file():
            return directory
    raise QADError(f"{package}: has no launch/torchrun.sh. Install the package again, or use a complete checkout.")


def command_line(command: str, *, on_all_gpus: bool | None = None) -> list[str]:
    """Return the beginning of a command line that runs a command of ``megatron-qad`` in a new process.

        >>> command_line("export")
        ['/usr/bin/python', '-m', 'megatron_qad.cli', 'export']

    Args:
        on_all_gpus: whether torchrun.sh starts one rank for each GPU; None means as the table of commands says.
    """
    if on_all_gpus is None:
        on_all_gpus = COMMANDS[command].uses_all_gpus
    if on_all_gpus:
        return [str(launch_directory() / "torchrun.sh"), "-m", MODULE, command]
    return [sys.executable, "-m", MODULE, command]


def is_rank(environ: Mapping[str, str]) -> bool:
    """Whether a launcher (torchrun, ``launch/task.py``) has started this process as one of its ranks."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def environment(num_processes: int | None = None) -> dict[str, str]:
    """Return the variables for a new process: torchrun.sh finds this interpreter as ``python``.

    Args:
        num_processes: ranks on this machine; None leaves it to ``NPROC_PER_NODE`` or the number of GPUs.
    """
    environ = dict(os.environ)
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', '')}"
    if num_processes is not None:
        environ["NPROC_PER_NODE"] = str(num_processes)
    return environ


def replace_with_ranks(command: str, argv: list[str], num_processes: int | None) -> None:
    """Replace this process by torchrun.sh, which runs the command on every GPU of this machine. Does not return.

    Args:
        num_processes: ranks on this machine. None leaves it to torchrun.sh: ``NPROC_PER_NODE``, or the number of GPUs.
    """
    environ = environment(num_processes)
    words = [*command_line(command, on_all_gpus=True), *argv]
    sys.stdout.flush()
    os.execve(words[0], words, environ)
