"""Programs end with one line after an error that a user can fix, and with a traceback after any other."""

import errno

import pytest

from megatron_qad.engine import QADError, entry_point


def exit_of(error: BaseException):
    def main():
        raise error

    with pytest.raises(SystemExit) as raised:
        entry_point.run(main)
    return raised.value.code


def test_user_errors_are_one_line():
    assert exit_of(QADError("--lr: not a number.")) == "error: --lr: not a number."
    full = OSError(errno.ENOSPC, "No space left on device", "/out/model")
    assert (
        exit_of(full)
        == "error: /out/model: No space left on device. The disk is full: free space or choose another disk."
    )
    assert "ulimit -v" in exit_of(MemoryError())


def test_status():
    entry_point.run(lambda: None)  # returns, so the process ends with status 0
    with pytest.raises(SystemExit) as raised:
        entry_point.run(lambda: 3)
    assert raised.value.code == 3


def test_bugs_keep_their_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        entry_point.run(main)
