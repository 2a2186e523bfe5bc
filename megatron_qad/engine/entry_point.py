"""Runs the main function of a program so that a user's mistake ends it with one line instead of a traceback."""

import os
import sys
from collections.abc import Callable

from megatron_qad.engine.system_errors import describe, explain

__all__ = ["describe", "run"]


def run(main: Callable[[], int | None]) -> None:
    """Run ``main``; end the process with the status that it returns, or with 1 after an error that a user can fix.

    Such errors (``system_errors.explain``) are printed without a traceback. Any other exception is a bug and keeps its
    traceback. Ctrl-C ends the process with status 130.

    Example::

        if __name__ == "__main__":
            entry_point.run(main)
    """
    try:
        status = main()
        sys.stdout.flush()  # the interpreter would report a full disk or a closed pipe in its own way
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        status = 130
    except BaseException as error:  # torch's CheckpointException is not an Exception
        if (message := explain(error)) is None:
            raise
        _end_stdout()
        status = f"error: {message}"
    if status:
        sys.exit(status)


def _end_stdout() -> None:
    """Write what is left in the buffer of stdout, or drop it if that fails: the interpreter would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
