"""Explains errors that the machine causes, in one line with the next step: disks, permissions, memory, connections."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_qad.engine.errors import QADError

_ADVICE = {
    errno.ENOSPC: "The disk is full: free space or choose another disk.",
    errno.EDQUOT: "The disk quota is used up: free space or choose another disk.",
    errno.EFBIG: "The limit of file sizes is reached (ulimit -f), or the disk does not hold files of this size.",
    errno.EROFS: "The file system is read-only: choose another directory.",
    errno.EACCES: "Change the permissions or choose another path.",
    errno.EPERM: "Change the permissions or choose another path.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENOMEM: "Free memory or raise the limit (ulimit -v).",
    errno.EADDRINUSE: "Choose another port or end the process that uses it.",
}


_OUT_OF_MEMORY = "out of memory. Free memory, raise the limit (ulimit -v), or use a smaller batch."
_BY_TEXT = (
    (r"can't allocate memory|std::bad_alloc|Cannot allocate memory", _OUT_OF_MEMORY),
    (r"CUDA out of memory", "out of memory. The GPU is full: use a smaller --micro-batch-size or more parallelism."),
    (r"can't start new thread", "no more threads can be started. Raise the limit (ulimit -u)."),
    (
        r"PytorchStreamWriter failed|inline_container\.cc:\d+\] \. (unexpected pos|open file failed)",
        "a file of the checkpoint could not be written. The disk may be full: free space or choose another disk.",
    ),
    (r"DataLoader worker .* killed by signal: Bus error", "/dev/shm is full. Make it larger, or use --num-workers 0."),
    (
        r"EADDRINUSE",
        "the port of the rendezvous is in use. Choose another MASTER_PORT or end the process that uses it.",
    ),
    (
        r"Connection (closed|reset) by peer|Broken pipe|ncclRemoteError",
        "the connection to another rank was lost. That rank has probably failed; see its error.",
    ),
)
"""Errors of torch that have a class and a text, but no errno: pattern -> what a user reads."""


def explain(error: BaseException) -> str | None:
    """Return one line with the next step, or None if the error is a bug of the program.

    Explained are QADError, errors of the operating system and of memory, and the classes in which libraries report
    them: safetensors, torch, and torch.distributed.checkpoint, which wraps the errors of all ranks in one.
    """
    if isinstance(error, QADError):
        return str(error)
    if isinstance(error, OSError):
        return describe(error)
    if isinstance(error, MemoryError):
        return _OUT_OF_MEMORY
    if type(error).__name__ == "CheckpointException":  # by name, because importing its module takes a second
        reasons = [explain(failure) for failure, _ in error.failures.values()]
        return reasons[0] if reasons and all(reasons) else None
    text = " ".join(str(error).split())
    if match := re.search(r"\(os error (\d+)\)", text):  # safetensors, tokenizers
        return describe(OSError(int(match[1]), os.strerror(int(match[1]))))
    if isinstance(error, RuntimeError):
        return next((message for pattern, message in _BY_TEXT if re.search(pattern, text)), None)
    return None


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Add the name of ``file`` to an error of the operating system that has none, such as that of a failed write."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(file)) from error


def describe(error: OSError, with_advice: bool = True) -> str:
    """Return what failed, why, and the next step (``with_advice``), in one line."""
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # copytree: (from, to, reason) of each
        _, target, reason = error.args[0][0]
        code = int(match[1]) if (match := re.match(r"\[Errno (\d+)\]", reason)) else None
        error = OSError(code, os.strerror(code) if code else reason, target)
    path = error.filename2 or error.filename
    what = f"{os.fsdecode(path)}: " if isinstance(path, str | bytes | os.PathLike) else ""
    advice = _ADVICE.get(error.errno or 0, "") if with_advice else ""
    return f"{what}{error.strerror or error}. {advice}".rstrip()
