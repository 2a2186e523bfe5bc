"""Megatron's command line: its parser with our flags added, and its global arguments."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from functools import partial

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args


def add_options(options: type, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a flag for every field of a dataclass, whose docstring becomes the help."""
    ArgumentGroupFactory(options).build_group(parser, title="quantization-aware distillation")
    for action in parser._actions:  # argparse formats help with %: "10%)" of a flag of megatron-core 0.19.2 ends --help
        if action.help is not argparse.SUPPRESS and action.help:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    return parser


def make_parser(options: type) -> argparse.ArgumentParser:
    """A parser of all of Megatron's flags and ours."""
    return add_options(options, add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def parse_globally(argv: Sequence[str], options: type, world_size: int) -> argparse.Namespace:
    """Have Megatron parse and validate ``argv``: sets its global arguments, and starts its loggers and its signal
    handler. Sets ``sys.argv``, from which it reads.

    Raises:
        Megatron's own errors, as they do upstream.
    """
    sys.argv = [sys.argv[0], *argv]
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world_size)  # a plan may be made for more ranks than there are
    try:
        return parse_and_validate_args(extra_args_provider=partial(add_options, options))
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
