"""Processes that end with the one that started them.

This file imports nothing of the package: ``launch/rank.py`` loads it by itself, before torch.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies, however the parent dies.

    It survives ``exec`` and is not inherited by children. The parent is the thread that started this process, so it
    must have been started by a thread that lives as long as it should.

    Args:
        parent: pid that the parent must have; None: of whichever is the parent now. If the parent is gone already,
            this process ends at once.
    """
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """For a rank that torchrun started: end with its agent, and by Ctrl-C without a traceback. Does nothing elsewhere.

    A program that a user starts by hand may outlive its shell (``nohup``), so the parent's death says nothing there.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
