"""Reads a command line with one error for each mistake, where argparse would print the usage of 800 flags."""

import argparse
from collections.abc import Collection, Sequence

from megatron_qad.config.flag_names import REMOVED, advice
from megatron_qad.engine.errors import QADError

_HELP = "megatron-qad train --help-all lists all flags"


def check_flags_exist(argv: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Check that the parser knows every flag, and that no word is left over.

    Raises:
        QADError: with the new name of an old flag, or with the most similar flag.
    """
    for word in argv:
        name = word.split("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and name in REMOVED:
            raise unknown_flag(word, ())
    _, unknown = parser.parse_known_args(argv)
    if not unknown:
        return
    word = next((word for word in unknown if word.startswith("-")), unknown[0])
    if not word.startswith("-"):
        before = argv[argv.index(word) - 1] if word in argv[1:] else ""
        place = f" after {before}" if before else ""
        raise QADError(f"{word!r}{place}: is not a flag, and no flag takes it as its value. Remove it; {_HELP}.")
    raise unknown_flag(word, option_names(parser))


def unknown_flag(word: str, valid: Collection[str]) -> QADError:
    """Return the error about a word of the command line that is not a flag.

    Args:
        valid: the names of all flags, without ``--``.
    """
    flag = word.split("=")[0]
    name = flag.removeprefix("--").replace("_", "-")
    if name in REMOVED:
        return QADError(f"--{name}: has no effect in this version of Megatron. Use --{REMOVED[name]}.")
    hint = advice(flag.lstrip("-"), valid, "--")
    return QADError(f"{flag}: no such flag; {hint or f'{_HELP}.'}")


def option_names(parser: argparse.ArgumentParser) -> set[str]:
    """Return the names of all flags, without ``--``."""
    return {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
