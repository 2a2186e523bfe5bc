"""Runs scripts as a user would, in a rank of the fork server, which has already imported their modules."""

import os
import resource
import runpy
import sys

from launch import ROOT


def script(
    path: str, argv: list[str], directory: str | None = None, file_kib: int | None = None, ranks: int | None = None
) -> None:
    """Run ``python path *argv``. Its exit status becomes that of the rank; errors are printed.

    Args:
        directory: working directory; None means that of the project.
        file_kib: maximum size of files; larger writes fail as on a full disk.
        ranks: value of WORLD_SIZE, for scripts that do not start the ranks.
    """
    if directory is not None:
        os.chdir(directory)
    if file_kib is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_kib << 10, resource.RLIM_INFINITY))
    if ranks is not None:
        os.environ["WORLD_SIZE"] = str(ranks)
    path = str(ROOT / path)
    sys.argv = [path, *argv]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")


def code(text: str, argv: list[str] | None = None) -> None:
    """Run ``python -c text *argv`` after ``init_runtime`` and the imports of a job."""
    sys.argv = ["-c", *(argv or [])]
    exec(text, {"__name__": "__main__"})
