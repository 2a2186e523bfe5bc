"""Scripts as a user starts them, in a rank of the fork server, which has their imports."""

import os
import resource
import runpy
import sys

from launch import ROOT


def script(
    path: str, argv: list[str], directory: str | None = None, file_kib: int | None = None, ranks: int | None = None
) -> None:
    """``python path *argv``; what it exits with is the rank's exit status, and an error is printed.

    Args:
        directory: to run in; the project's if None.
        file_kib: no file may grow beyond this size: a write then fails as on a full disk.
        ranks: the number that the script is told of, for what starts none of them.
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
    """``python -c text *argv`` after ``prepare`` and the imports of a job."""
    sys.argv = ["-c", *(argv or [])]
    exec(text, {"__name__": "__main__"})
