"""Separates the output of a job: its own lines, warnings and errors stay on the terminal, other packages' go to a file.

Megatron prints its arguments (750 lines), a line per iteration, timers and memory; torch, modelopt and others warn. The
code that prints decides where a text goes: ``_is_foreign`` looks at the calling frames. So prints of a user's callback,
tracebacks and errors that another package logs always reach the terminal. Output of C++ code, which does not pass
through ``sys.stdout`` and ``sys.stderr``, is not redirected.
"""

import contextlib
import logging
import sys
import sysconfig
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import TextIO

from megatron_qad.engine.event_writer import FailureLog

_PRINTERS = frozenset({"print_rank_0", "print_rank_last"})
"""Functions of Megatron that we print with, too: their caller decides."""
_SHOWN = frozenset({"megatron_qad", "wandb"})
"""Installed packages whose output is for the user: ours, and wandb, which prints the address of the run."""
_HELPERS = sys.stdlib_module_names | {"tqdm"}
"""Modules that print for their callers: logging, warnings, progress bars."""
_INSTALLED = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
_MAX_WAITING = 20_000
"""Number of texts that wait for the file, of which a start writes about 2,000; the oldest are dropped first."""


class JobOutput:
    """The output of one rank. Created and installed before Megatron parses its flags; closed at the end of the job.

        output = JobOutput(Path("run/megatron.log"))
        output.install()
        output.open()  # when this process owns the directory; what was printed before is written now
        output.close()

    Args:
        path: file for the output of other packages. None drops it.
        shows_all: whether the terminal shows it, too.
    """

    def __init__(self, path: Path | None, *, shows_all: bool = False):
        self.path, self._shows_all = path, shows_all
        self._waiting: deque[str] | None = None if path is None else deque(maxlen=_MAX_WAITING)
        self._file: TextIO | None = None
        self._is_closed = False
        self._failures = FailureLog(str(path))

    def install(self) -> None:
        """Replace ``sys.stdout`` and ``sys.stderr``, also in the handlers of ``logging`` that write to them."""
        streams = {}
        for name in ("stdout", "stderr"):
            old = getattr(sys, name)
            new = Console(old.stream if isinstance(old, Console) else old, self)
            setattr(sys, name, new)
            streams[id(old)] = streams[id(new.stream)] = new
        names = [None, *logging.root.manager.loggerDict]
        for handler in {handler for name in names for handler in logging.getLogger(name).handlers}:
            held = vars(handler).get("stream")  # logging's last resort has a property instead, which is sys.stderr
            if isinstance(handler, logging.StreamHandler) and id(held) in streams:
                handler.setStream(streams[id(held)])

    def open(self) -> None:
        """Open the file, at whose end this start is appended, and write what waits for it."""
        if self._waiting is None or self._is_closed:
            return
        waiting, self._waiting = self._waiting, None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            self._failures.report(error)
        self.log(f"---- start of {time.strftime('%Y-%m-%d %H:%M:%S')} ----\n{''.join(waiting)}")

    def log(self, text: str) -> None:
        """Write text to the file. Before ``open`` it waits; without a file it is dropped."""
        if self._waiting is not None:
            self._waiting.append(text)
        elif self._file is not None:
            try:
                self._file.write(text)
            except OSError as error:
                self._failures.report(error)

    def log_line(self, line: str) -> None:
        """Write a line of the job itself that only a search for a problem needs, as ``log`` does."""
        self.log(f"{line}\n")
        if self._shows_all:
            print(line, flush=True)

    def close(self) -> None:
        """Close the file. Everything that is printed from now on goes to the terminal."""
        self._is_closed, self._waiting = True, None
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                self._failures.report(error)

    def takes(self, text: str, frame: FrameType | None) -> bool:
        """Log a text if code of another package printed it. Returns whether the terminal must not show it."""
        if self._is_closed or not _is_foreign(frame):
            return False
        self.log(text)
        return not self._shows_all


class Console:
    """A wrapper of stdout or stderr that passes the output of other packages to ``JobOutput``.

    It writes whole lines at once: ``print`` writes a text and its newline apart, and two unbuffered ranks would mix
    theirs. It drops text on a full disk or a closed pipe instead of ending the job.
    """

    def __init__(self, stream: TextIO, output: JobOutput | None = None):
        self.stream, self._output = stream, output
        self._line: list[str] = []  # the beginning of an unfinished line; a list, because appending is atomic

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        if self._output is not None and self._output.takes(text, sys._getframe().f_back):
            return len(text)
        self._line.append(text)
        if text.endswith("\n"):
            self._write_line()
        return len(text)

    def flush(self) -> None:
        self._write_line()
        with contextlib.suppress(OSError):
            self.stream.flush()

    def _write_line(self) -> None:
        parts, self._line = self._line, []
        if parts:
            with contextlib.suppress(OSError):  # there is no place left to report the error
                self.stream.write("".join(parts))


def _is_foreign(frame: FrameType | None) -> bool:
    """Return whether another package's code printed, given the frame that wrote to the stream.

    Text without such code is not foreign: the interpreter writes the traceback of an error that ends the process. Nor
    are tracebacks that a package prints, and records that it logs as errors.
    """
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        package = module.partition(".")[0]
        if package == "traceback":
            return False
        if package == "logging" and getattr(frame.f_locals.get("record"), "levelno", 0) >= logging.ERROR:
            return False
        is_printer = package == "megatron" and frame.f_code.co_name in _PRINTERS
        if package not in _HELPERS and not is_printer:
            is_installed = package == "megatron" or frame.f_code.co_filename.startswith(_INSTALLED)
            return is_installed and package not in _SHOWN
        frame = frame.f_back
    return False
