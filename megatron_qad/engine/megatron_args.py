"""Megatron's command line: its argument parser, extended by our flags, and its global arguments."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from functools import partial

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args


def add_options(options: type, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a flag for every field of a dataclass; the field's docstring becomes the help text."""
    ArgumentGroupFactory(options).build_group(parser, title="quantization-aware distillation")
    for action in parser._actions:  # argparse formats help with %; a "10%)" in megatron-core 0.19.2 would break --help
        if action.help is not argparse.SUPPRESS and action.help:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    return parser


def make_parser(options: type) -> argparse.ArgumentParser:
    """Create a parser of Megatron's flags and ours."""
    return add_options(options, add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def parse_globally(argv: Sequence[str], options: type, world_size: int) -> argparse.Namespace:
    """Let Megatron parse and validate ``argv``, set its global arguments, and start its loggers and signal handler.

    Sets ``sys.argv``, from which Megatron reads. Megatron's own errors are raised unchanged.
    """
    sys.argv = [sys.argv[0], *argv]
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world_size)  # a dry run may plan for more ranks than there are
    try:
        return parse_and_validate_args(extra_args_provider=partial(add_options, options))
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
