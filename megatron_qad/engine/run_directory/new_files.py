"""Creates files and directories that are written under a temporary name and renamed when they are complete.

The temporary names can be predicted. In a directory that others may write to, someone could have planted a link of that
name, and a program that opens it would write to the link's target. So a leftover of that name, which is a file of a
killed process or a link, is removed, and the new one is created exclusively: if another appears meanwhile, creation
fails with FileExistsError. Not covered: others who may rename what is in the directory while it is written.
"""

import os
import shutil
from pathlib import Path
from typing import IO

from megatron_qad.engine.system_errors import naming


def open_new(file: Path, mode: str = "w") -> IO:
    """Create ``file`` after removing a file or link of that name, and open it for writing ("w" or "wb")."""
    file.unlink(missing_ok=True)
    return open(file, mode, opener=_create, encoding=None if "b" in mode else "utf-8")


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | os.O_NOFOLLOW, 0o666)  # O_EXCL alone follows no link, but NFSv2 lacks it


def make_new_directory(directory: Path) -> None:
    """Create ``directory`` after removing a directory, file or link of that name. Its parent must exist."""
    remove(directory)
    directory.mkdir()


def remove(path: Path) -> None:
    """Remove a directory with its content, a file, or a link but not its target. Does nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy_new(source: Path, target: Path) -> None:
    """Copy a file with its permissions and times to ``target``, created as by ``open_new``; a failure leaves none."""
    try:
        with open(source, "rb") as data, naming(target), open_new(target, "wb") as copy:
            shutil.copyfileobj(data, copy)
        shutil.copystat(source, target)
    except OSError:
        target.unlink(missing_ok=True)
        raise
