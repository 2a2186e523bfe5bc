"""The terminal shows the output of the job itself and all errors; that of other packages goes to a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qad.engine import init_runtime

init_runtime()

from megatron.training import print_rank_0  # noqa: E402

from megatron_qad.engine.console import Console, JobOutput  # noqa: E402

SCRIPT = """
import logging, sys, threading, warnings
from pathlib import Path
import torch
from tqdm import tqdm

logging.basicConfig()  # holds the stream from before the job, as with Megatron
from megatron_qad.engine.console import JobOutput
output = JobOutput(Path(sys.argv[1]))
output.install()
output.open()
in_megatron = lambda code: exec(compile(code, "x.py", "exec"), {"__name__": "megatron.core.x"})
in_megatron("import warnings, logging; warnings.warn('warned'); logging.getLogger('x').warning('logged')")
in_megatron("import logging; logging.getLogger('x').error('lost connection')")
in_megatron("import traceback\\ntry: 1 / 0\\nexcept Exception: traceback.print_exc()")
torch.nn.init.zeros_(torch.zeros(0)), torch.nn.Linear(0, 1)  # torch warns: initializing zero elements
warnings.warn("ours, warned")
print("ours, to stderr", file=sys.stderr)
for _ in tqdm([1], desc="ours, progress"):
    pass
thread = threading.Thread(target=lambda: torch.zeros("threaded"))
thread.start()
thread.join()
torch.nn.Linear(1, "main")
"""


@pytest.fixture(autouse=True)
def streams(capsys, monkeypatch):
    """Gives the streams back after each test."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


def in_megatron(code: str) -> None:
    """Run code as a function of Megatron."""
    exec(compile(code, "/opt/megatron/x.py", "exec"), {"__name__": "megatron.training.training"})


def test_code_that_prints_decides(tmp_path, capsys):
    output = JobOutput(tmp_path / "run" / "megatron.log")
    output.install()
    in_megatron("print('arguments')\nfrom megatron.training import print_rank_0\nprint_rank_0('iteration 1')")
    print("ours")
    print_rank_0("ours, by Megatron's function")
    assert not output.path.parent.exists(), "the directory is not this process's before open()"
    output.open()
    in_megatron("print('later')")
    _, *foreign = output.path.read_text().splitlines()
    assert foreign == ["arguments", "iteration 1", "later"]
    assert capsys.readouterr().out == "ours\nours, by Megatron's function\n"
    output.close()


def test_warnings_and_errors(tmp_path):
    """Also the error in another package that ends the process, and one that ends a thread."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])} | {"PYTHONWARNINGS": "default"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    foreign, shown = (tmp_path / "log").read_text(), done.stderr
    assert done.returncode == 1
    for text in ("UserWarning: warned", "WARNING:x:logged", "Initializing zero-element tensors"):
        assert text in foreign and text not in shown, text
    errors = ("lost connection", "ZeroDivisionError", "Exception in thread", "TypeError: empty()")
    for text in (*errors, "UserWarning: ours, warned", "ours, to stderr", "ours, progress"):
        assert text in shown and text not in foreign, (text, shown)
    assert shown.count("Traceback") == 3


def test_next_job_of_a_process(tmp_path, capsys):
    first, second = JobOutput(tmp_path / "first"), JobOutput(tmp_path / "second")
    for output in (first, second):
        output.install()
        output.open()
        in_megatron("print('text')")
    assert all(output.path.read_text().count("text") == 1 for output in (first, second))
    second.close()
    in_megatron("print('after the job')")
    assert capsys.readouterr().out == "after the job\n"


def test_starts_are_appended_and_all_can_be_shown(tmp_path, capsys):
    for text in ("first", "second"):
        output = JobOutput(tmp_path / "log", shows_all=True)
        output.install()
        in_megatron(f"print('{text}')")
        output.open()
        output.log_line(f"waits of {text}")
        output.close()
    lines = output.path.read_text().splitlines()
    assert [line for line in lines if "start of" not in line] == [
        "first",
        "waits of first",
        "second",
        "waits of second",
    ]
    assert capsys.readouterr().out.splitlines() == ["first", "waits of first", "second", "waits of second"]
    dropped = JobOutput(None)
    dropped.install()
    dropped.open()
    in_megatron("print('nowhere')")
    assert capsys.readouterr().out == ""


def test_disk_errors_are_reported_once(tmp_path, capsys):
    output = JobOutput(Path("/dev/full"))
    output.install()
    output.open()
    for _ in range(3):
        in_megatron("print('x' * 10_000)")
    output.close()
    assert capsys.readouterr().out.count("ERROR: /dev/full: ") == 1
    full = Console(open("/dev/full", "w"))  # noqa: SIM115
    for _ in range(3):
        print("x" * 10_000, file=full, flush=True)
    assert full.fileno() > 2


def test_a_line_is_written_at_once(tmp_path):
    """So that unbuffered processes with one terminal do not mix their lines."""

    class Stream:
        writes: list[str] = []

        def write(self, text: str) -> int:
            self.writes.append(text)
            return len(text)

        def flush(self) -> None:
            pass

    console = Console(Stream())
    print("first", 1, file=console)
    print("progress", end="", file=console)
    assert Stream.writes == ["first 1\n"]
    console.flush()
    print("first\nsecond", file=console)
    assert Stream.writes[1:] == ["progress", "first\nsecond\n"]
