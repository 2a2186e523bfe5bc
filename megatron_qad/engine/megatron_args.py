"""Megatron's command line: its argument parser, extended by our flags, and its global arguments."""

import argparse
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args

from megatron_qad.engine.errors import QADError


def add_options(options: type, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a flag for every field of a dataclass; the field's docstring becomes the help text."""
    ArgumentGroupFactory(options).build_group(parser, title="quantization-aware distillation")
    parser.add_argument(  # Megatron has no flag that turns off what config.machine_options turns on
        "--no-dist-ckpt-optim-fully-reshardable",
        action="store_false",
        dest="dist_ckpt_optim_fully_reshardable",
        help="Save the distributed optimizer as it is sharded, which needs no communication and less host memory; the "
        "job can then resume with other data-parallel sizes only.",
    )
    for action in parser._actions:  # argparse formats help with %; a "10%)" in megatron-core 0.19.2 would break --help
        if action.help is not argparse.SUPPRESS and action.help:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    return parser


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of 800 flags."""

    def error(self, message: str) -> NoReturn:
        """Raise the error of a flag's value, such as ``--lr: invalid float value: 'abc'``."""
        raise QADError(f"{message.removeprefix('argument ')}. megatron-qad train --help-all describes the flag.")


def make_parser(options: type) -> argparse.ArgumentParser:
    """Create a parser of Megatron's flags and ours. Its errors are ``QADError``."""
    return add_options(options, add_megatron_arguments(OneLineParser(allow_abbrev=False)))


def parse_globally(argv: Sequence[str], options: type, world_size: int) -> argparse.Namespace:
    """Let Megatron parse and validate ``argv``, set its global arguments, and start its loggers and signal handler.

    Sets ``sys.argv``, from which Megatron reads.

    Raises:
        QADError: Megatron refuses the flags; the error quotes its message, or the condition that failed.
    """
    sys.argv = [sys.argv[0], *argv]
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world_size)  # a dry run may plan for more ranks than there are
    try:
        with megatrons_refusals("parse_args", "validate_args", "validate_yaml"):
            return parse_and_validate_args(extra_args_provider=partial(add_options, options))
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


@contextlib.contextmanager
def megatrons_refusals(*functions: str) -> Iterator[None]:
    """Context manager: an error of Megatron's checks of flags becomes a ``QADError`` of one line.

    Many of its assertions have no message. Then the condition of the assertion says what was refused.

    Args:
        functions: the functions of Megatron that check flags; errors from elsewhere are raised unchanged.
    """
    try:
        yield
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, QADError) or not any(frame.name in functions for frame in frames):
            raise
        line = (frames[-1].line or "").strip()
        reason = " ".join(str(error).split()) or f"the condition '{line.removeprefix('assert ')}' does not hold"
        where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        raise QADError(f"Megatron refuses the flags: {reason.rstrip('.')} ({where}). Change the flags.") from error
