"""The command ``megatron-qad COMMAND [FLAGS]``."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import megatron_qad
from megatron_qad.cli import launcher
from megatron_qad.cli.command_table import COMMANDS, Command, module_of
from megatron_qad.engine import entry_point
from megatron_qad.engine.errors import QADError

_NPROC = "--nproc-per-node"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line and end the process with its exit status.

    Args:
        argv: the command and its flags; None takes those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    entry_point.run(lambda: run(words))


def run(words: list[str]) -> int | None:
    """Run a command in this process, or replace this process by its ranks.

    Raises:
        QADError: there is no such command, or its flags are refused.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        return print(overview())
    if words[0] == "--version":
        return print(f"megatron-qad {megatron_qad.__version__}")
    if words[0] == "--launch-dir":  # for sbatch, if the package is installed without a checkout
        return print(launcher.launch_directory())
    name, argv = words[0], words[1:]
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean '{similar[0]}'?" if similar else "megatron-qad --help lists the commands."
        raise QADError(f"megatron-qad {name}: no such command. {hint}")
    command = COMMANDS[name]
    if not launcher.is_rank(os.environ) and not _asks_for_help(argv):
        argv = _start(name, command, argv)
    return importlib.import_module(module_of(name)).main(argv)


def _start(name: str, command: Command, argv: list[str]) -> list[str]:
    """Check the flags early, and start the ranks, which does not return. Returns the flags to use in this process."""
    processes = None
    if command.uses_all_gpus:
        argv, processes = _take_processes(argv)
    if command.takes_job_flags:
        from megatron_qad.cli.early_checks import check_job_flags

        check_job_flags(name, argv)
    if not command.uses_all_gpus:
        return argv
    if "--qad-dry-run" in argv:  # plans for the ranks without starting them
        if processes := processes or os.environ.get("NPROC_PER_NODE"):
            os.environ["WORLD_SIZE"] = str(processes)
        return argv
    launcher.replace_with_ranks(name, argv, processes)
    return argv


def _asks_for_help(argv: Sequence[str]) -> bool:
    return any(word in ("-h", "--help", "--help-all") for word in argv)


def _take_processes(argv: Sequence[str]) -> tuple[list[str], int | None]:
    """Remove ``--nproc-per-node N`` from the flags and return its value."""
    left, number = [], None
    remaining = iter(argv)
    for word in remaining:
        flag, separator, value = word.partition("=")
        if flag != _NPROC:
            left.append(word)
            continue
        value = value if separator else next(remaining, "")
        if not value.isdigit() or int(value) < 1:
            raise QADError(f"{_NPROC} {value}: expected a whole number from 1 on, the processes on this machine.")
        number = int(value)
    return left, number


def overview() -> str:
    """Return the help of ``megatron-qad`` without a command."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: megatron-qad COMMAND [FLAGS]",
        "",
        "Quantization-aware distillation to NVFP4 on NVIDIA's Megatron.",
    ]
    group = None
    for name, command in COMMANDS.items():
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines.append(f"  {name:<{width}}  {command.summary}")
    lines += [
        "",
        "megatron-qad COMMAND --help describes the flags of a command. Commands that train or evaluate start one",
        f"process for each GPU of this machine; {_NPROC} N or NPROC_PER_NODE changes the number.",
        "Several nodes: slurm.sbatch in the directory that megatron-qad --launch-dir prints (docs/slurm.md).",
    ]
    return "\n".join(lines)
