"""Megatron parses its own sources for the help texts of its options, two to four times in a job: a quarter of a tiny
one. Here a process reads them once, for itself and for those that it forks.
"""

import argparse
import functools

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments


@functools.cache
def read_once() -> None:
    """Keep what has been read, and read all that a job's parser needs. Idempotent."""
    read = functools.partial(ArgumentGroupFactory._get_field_docstrings, object.__new__(ArgumentGroupFactory))
    found = functools.cache(read)
    ArgumentGroupFactory._get_field_docstrings = lambda factory, config: found(config)
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
