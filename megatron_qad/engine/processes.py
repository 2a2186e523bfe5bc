"""Ends a process together with the one that started it.

This file imports nothing from the package, because ``launch/rank.py`` loads it alone, before torch.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process when its parent dies, whatever the cause.

    The setting survives ``exec`` and is not inherited by children. The kernel watches the thread that started this
    process, so that thread must live as long as the process should.

    Args:
        parent: expected pid of the parent. None means the current parent. If the parent has died already, this process
            ends immediately.
    """
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """Make a rank of torchrun end with its agent, and end on Ctrl-C without a traceback. Does nothing elsewhere.

    A program that a user starts by hand may outlive its shell (``nohup``), so it must not end with its parent.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
