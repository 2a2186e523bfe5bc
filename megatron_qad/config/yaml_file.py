"""``--config FILE.yaml``: Megatron and QAD options by name, turned into command-line flags that the real ones
override."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_qad.engine.errors import QADError


def expand(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Replace ``--config FILE`` by the file's options, placed before the other flags, which therefore win.

    Keys are option names with ``-`` or ``_``; ``true`` sets a flag, ``false`` and ``null`` leave it at its default, a
    list gives several values.

    Args:
        argv: command line without the program's name.
        parser: a parser that knows every valid option.

    Raises:
        QADError: a file that is missing or no mapping, or a key that is no option; the nearest valid name is given.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    found, rest = first.parse_known_args(list(argv))
    from_files = [flag for file in found.config for flag in _flags_of(Path(file), parser)]
    return from_files + rest


def _flags_of(file: Path, parser: argparse.ArgumentParser) -> list[str]:
    if not file.is_file():
        raise QADError(f"--config {file}: no such file")
    try:
        options = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise QADError(f"--config {file}: not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise QADError(f"--config {file}: expected a mapping of option names to values, found {type(options).__name__}")
    valid = {option: action for action in parser._actions for option in action.option_strings}
    flags: list[str] = []
    for key, value in options.items():
        option = _option_of(str(key), valid)
        if option is None:
            names = sorted({name.removeprefix("--") for name in valid})
            near = difflib.get_close_matches(str(key).replace("_", "-"), names, n=1)
            raise QADError(f"--config {file}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if value is True and valid[option].nargs == 0:
            flags.append(option)
        elif value is None or (value is False and valid[option].nargs == 0):
            continue
        else:
            values = value if isinstance(value, list) else [value]
            flags += [option, *(str(v) for v in values)]
    return flags


def _option_of(key: str, valid: dict) -> str | None:
    for option in (f"--{key}", f"--{key.replace('_', '-')}"):
        if option in valid:
            return option
    return None


def to_flags(options: dict) -> list[str]:
    """Option names and values -> command-line flags. True is a bare flag; False and None are left out."""
    flags: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def without(argv: Sequence[str], *flags: str) -> list[str]:
    """``argv`` without these flags and the one value of each."""
    kept = iter(argv)
    found = []
    for word in kept:
        if word in flags:
            next(kept, None)
        elif word.split("=")[0] not in flags:
            found.append(word)
    return found
