"""Runs the main function of a program so that a user's mistake ends it with one line instead of a traceback."""

import errno
import os
import sys
from collections.abc import Callable

from megatron_qad.engine.errors import QADError

_ADVICE = {
    errno.ENOSPC: "The disk is full: free space or choose another disk.",
    errno.EDQUOT: "The disk quota is used up: free space or choose another disk.",
    errno.EROFS: "The file system is read-only: choose another directory.",
    errno.EACCES: "Change the permissions or choose another path.",
    errno.EPERM: "Change the permissions or choose another path.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENOMEM: "Free memory or raise the limit (ulimit -v).",
    errno.EADDRINUSE: "Choose another port or end the process that uses it.",
}


def run(main: Callable[[], int | None]) -> None:
    """Run ``main``; end the process with the status that it returns, or with 1 after an error that a user can fix.

    Such errors are ``QADError`` and those of the operating system (a full disk, a missing permission, no memory), which
    are printed without a traceback. Any other exception is a bug and keeps its traceback.

    Example::

        if __name__ == "__main__":
            entry_point.run(main)
    """
    try:
        status = main()
    except QADError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {describe(error)}")
    except MemoryError:
        sys.exit("error: out of memory. Free memory, raise the limit (ulimit -v), or use a smaller batch.")
    if status:
        sys.exit(status)


def describe(error: OSError) -> str:
    """Return what failed, why, and the next step, in one line."""
    path = error.filename2 or error.filename
    what = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes | os.PathLike) else ""
    advice = _ADVICE.get(error.errno or 0, "")
    return f"{what}{error.strerror or error}. {advice}".rstrip()
