"""Programs end with one line after an error that a user can fix, and with a traceback after any other."""

import errno
import multiprocessing
import os
import signal
import sys

import pytest
import torch

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


def test_full_memory_is_one_line():
    with pytest.raises(SystemExit, match="error: out of memory. Free memory"):
        entry_point.run(lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert exit_of(torch.OutOfMemoryError("CUDA out of memory")).startswith("error: out of memory.")
    with pytest.raises(RuntimeError, match="another"):
        entry_point.run(lambda: exit_of(RuntimeError("another")))


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


def print_lines(num_lines: int, interrupted: bool) -> None:
    for _ in range(num_lines):
        print("a line of the output")
    if interrupted:
        signal.raise_signal(signal.SIGINT)


def _program(stdout: int, stderr: str, *args) -> None:
    os.dup2(stdout, 1)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(stderr, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    entry_point.run(lambda: print_lines(*args))


def end_of(tmp_path, stdout: int, num_lines: int = 9, interrupted: bool = False) -> tuple[int, str]:
    """Exit status and stderr of a program that prints to the descriptor ``stdout``."""
    errors = tmp_path / "stderr"
    arguments = (stdout, str(errors), num_lines, interrupted)
    process = multiprocessing.get_context("fork").Process(target=_program, args=arguments)
    process.start()
    os.close(stdout)
    process.join(50)
    return process.exitcode, errors.read_text()


def test_stdout_that_cannot_be_written(tmp_path):
    """The interpreter printed "Exception ignored" for what was left in the buffer."""
    full = "No space left on device. The disk is full: free space or choose another disk."
    assert end_of(tmp_path, os.open("/dev/full", os.O_WRONLY)) == (1, f"error: {full}\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert end_of(tmp_path, writer, num_lines=9999) == (1, "error: Broken pipe.\n")


def test_interrupted_program_has_no_traceback(tmp_path):
    reader, writer = os.pipe()
    assert end_of(tmp_path, writer, interrupted=True) == (130, "error: interrupted.\n")
    assert os.read(reader, 9999) == b"a line of the output\n" * 9
    os.close(reader)
