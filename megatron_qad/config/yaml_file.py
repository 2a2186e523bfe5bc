"""``--config FILE.yaml``: turns Megatron and QAD options in YAML into flags that the command line overrides."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.config.flag_names import advice
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_yaml


def expand(argv: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """Replace ``--config FILE`` with the file's options, placed before the other flags, which therefore override them.

    Keys are option names with ``-`` or ``_``. ``true`` sets a flag, ``false`` and ``null`` leave it at its default, and
    a list gives several values.

    Args:
        argv: command line without the program's name.
        parser: a parser that knows every valid option.

    Raises:
        QADError: a file is missing or not a mapping, or a key is unknown; the error names the nearest valid option.
    """
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", action="append", default=[])
    parsed, other_flags = config_parser.parse_known_args(list(argv))
    file_flags = [flag for file in parsed.config for flag in _read_flags(Path(file), parser)]
    return file_flags + other_flags


def _read_flags(file: Path, parser: argparse.ArgumentParser) -> list[str]:
    if not file.is_file():
        raise QADError(f"--config {file}: no such file. Check the path.")
    options = read_yaml(file, f"--config {file}")
    if not isinstance(options, dict):
        raise QADError(f"--config {file}: expected a mapping of option names to values, found {type(options).__name__}")
    valid = {option: action for action in parser._actions for option in action.option_strings}
    flags: list[str] = []
    for key, value in options.items():
        option = _find_option(str(key), valid)
        if option is None:
            hint = advice(str(key), {name.removeprefix("--") for name in valid})
            raise QADError(f"--config {file}: unknown key {key!r}" + (f"; {hint}" if hint else ""))
        _check_value(file, key, value, valid[option])
        if value is True and valid[option].nargs == 0:
            flags.append(option)
        elif value is None or (value is False and valid[option].nargs == 0):
            continue
        else:
            values = value if isinstance(value, list) else [value]
            flags += [option, *(str(v) for v in values)]
    return flags


def _check_value(file: Path, key: str, value: object, action: argparse.Action) -> None:
    """Check that a value has the form that the option needs; the parser checks its type."""
    if value is None:
        return
    if action.nargs == 0 and not isinstance(value, bool):
        expected = "true or false"
    elif isinstance(value, dict) or isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        expected = "a value or a list of values"
    elif action.nargs is None and isinstance(value, list):
        expected = "one value, not a list"
    else:
        return
    raise QADError(f"--config {file}: {key}: {value!r}: expected {expected}.")


def _find_option(key: str, valid: dict) -> str | None:
    for option in (f"--{key}", f"--{key.replace('_', '-')}"):
        if option in valid:
            return option
    return None


def to_flags(options: dict) -> list[str]:
    """Turn option names and values into command-line flags. True is a bare flag; False and None are left out."""
    flags: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return flags


def remove_flags(argv: Sequence[str], *flags: str) -> list[str]:
    """Return ``argv`` without the given flags and the one value of each."""
    remaining = iter(argv)
    kept = []
    for word in remaining:
        if word in flags:
            next(remaining, None)
        elif word.split("=")[0] not in flags:
            kept.append(word)
    return kept
