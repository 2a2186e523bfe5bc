"""Checks of a job's command line that need no torch, so that a typo or a wrong path is reported within a second.

The job itself makes these checks again, with all others (``config.job_config``).
"""

import importlib
import importlib.metadata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from megatron_qad.cli.command_table import module_of
from megatron_qad.config.command_line import unknown_flag
from megatron_qad.config.flag_names import REMOVED
from megatron_qad.data.blends import parse_blend
from megatron_qad.data.prefix_files import file_sizes
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.config_file import model_config_file
from megatron_qad.quantization.policy_file import find_policy

FLAG_NAMES = Path(__file__).parent / "flag_names.txt"
"""Names of all flags of a job, written by tools/flags_page.py. The first line is the version of megatron-core."""
_CHECKPOINTS = ("--qad-teacher", "--qad-student")
_DATA = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")


def check_job_flags(command: str, argv: Sequence[str]) -> None:
    """Check that all flags exist, and that the files that they name do.

    Values in ``--config`` files are left to the job.

    Args:
        command: the command, which may have flags of its own.

    Raises:
        QADError: as the job would raise it.
    """
    known = _known_flags()
    names = None if known is None else known | _own_flags(command)
    flags = flag_values(argv)
    for flag, _ in flags:
        key = flag.removeprefix("--").replace("_", "-")
        if key in REMOVED or names is not None and flag not in names:
            raise unknown_flag(flag, {name.removeprefix("--") for name in names or ()})
    for flag, values in flags:
        if values:  # the job's parser reports a missing value
            _check_files(flag, values)


def _check_files(flag: str, values: Sequence[str]) -> None:
    """Check that the files exist that a flag names."""
    if flag in _CHECKPOINTS:
        model_config_file(values[-1])
    elif flag == "--qad-policy":
        find_policy(values[-1])
    elif flag == "--config" and not Path(values[-1]).is_file():
        raise QADError(f"--config {values[-1]}: no such file. Check the path.")
    elif flag in _DATA:
        prefixes, _ = parse_blend(values, flag)
        for prefix in prefixes:
            file_sizes(prefix)


def flag_values(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return each flag of a command line with the words that follow it.

    >>> flag_values(["--lr", "1e-5", "--bf16", "--config=a.yaml"])
    [('--lr', ['1e-5']), ('--bf16', []), ('--config', ['a.yaml'])]
    """
    found: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, separator, value = word.partition("=")
            found.append((name, [value] if separator else []))
        elif found:
            found[-1][1].append(word)
    return found


@cache
def _known_flags() -> frozenset[str] | None:
    """Return the names of all flags of a job; None if another version of Megatron is installed."""
    version, *names = FLAG_NAMES.read_text().split()
    return frozenset(names) if version == importlib.metadata.version("megatron-core") else None


def _own_flags(command: str) -> set[str]:
    module = importlib.import_module(module_of(command))
    parser = module.make_parser() if hasattr(module, "make_parser") else None
    own = set() if parser is None else {option for action in parser._actions for option in action.option_strings}
    return own | {"--help", "--help-all"}
