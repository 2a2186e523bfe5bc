"""The argument parser that all commands share."""

import argparse

JOB_FLAGS = "All flags of `megatron-qad train` are accepted as well; its --help and --help-all list them."


def command_parser(name: str, description: str, *, epilog: str | None = None) -> argparse.ArgumentParser:
    """Create the parser of ``megatron-qad NAME``. Flags cannot be abbreviated, and texts keep their line breaks.

    Args:
        name: the command's name.
        description: the docstring of its module.
        epilog: text after the flags.
    """
    return argparse.ArgumentParser(
        prog=f"megatron-qad {name}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
