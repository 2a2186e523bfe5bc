"""Locks allow one writer for each output, tested with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_qad.engine import QADError
from megatron_qad.engine.run_directory import locks

HOLD = """
import sys, time
from megatron_qad.engine.run_directory import locks
{settings}
locks.lock_directory(sys.argv[1], "--save")
print("held", flush=True)
time.sleep(60)
"""


def holder(directory: Path, settings: str = "") -> subprocess.Popen:
    """Start a process that locks ``directory``."""
    code = HOLD.format(settings=settings)
    process = subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def on_another_machine(monkeypatch):
    """Make this process believe that it runs on another machine, where the holder's pid means nothing."""
    monkeypatch.setattr(locks, "_machine", lambda: "another boot")


def test_second_process_is_refused_until_first_ends(tmp_path):
    first = holder(tmp_path / "run")
    with pytest.raises(QADError) as refused:
        locks.lock_directory(tmp_path / "run", "--save")
    message = str(refused.value)
    assert f"--save {tmp_path}/run: is in use by process {first.pid} on " in message
    assert ", started 20" in message and f"The lock file is {tmp_path}/run/qad.lock." in message
    first.kill()
    first.wait()
    locks.lock_directory(tmp_path / "run", "--save")
    locks.lock_directory(tmp_path / "run", "--save")  # a second call does nothing
    assert json.loads((tmp_path / "run" / "qad.lock").read_text())["pid"] == os.getpid()


def test_lock_is_stale_if_pid_was_reused(tmp_path):
    with locks.lock_output(tmp_path / "out"):
        ours = json.loads((tmp_path / ".out.lock").read_text())
    (tmp_path / ".out.lock").write_text(json.dumps(ours | {"start_ticks": ours["start_ticks"] - 1}))
    with locks.lock_output(tmp_path / "out"):
        assert json.loads((tmp_path / ".out.lock").read_text()) == ours
    assert list(tmp_path.iterdir()) == []


def test_lock_of_another_machine_is_held_while_it_is_touched(tmp_path, on_another_machine):
    first = holder(tmp_path, "locks.SECONDS_BETWEEN_BEATS = 2")
    try:
        begun = time.monotonic()
        with pytest.raises(QADError, match="is in use by"):
            locks.lock_directory(tmp_path, "--save")
        assert time.monotonic() - begun < 10
    finally:
        first.kill()
        first.wait()


def test_untouched_lock_of_another_machine_becomes_stale(tmp_path, monkeypatch, on_another_machine, capfd):
    first = holder(tmp_path)
    first.kill()
    first.wait()
    monkeypatch.setattr(locks, "SECONDS_UNTIL_STALE", 3)
    locks.lock_directory(tmp_path, "--save")
    assert "last seen 0 s ago; waiting up to 3 s" in capfd.readouterr().out


def test_process_ends_when_its_lock_was_taken_over(tmp_path):
    """As after a suspension of minutes, during which the lock became stale for another machine."""
    first = holder(tmp_path, "locks.SECONDS_BETWEEN_BEATS = 0.5")
    lock = tmp_path / "qad.lock"
    other = json.loads(lock.read_text()) | {"host": "elsewhere", "pid": 7}
    os.kill(first.pid, signal.SIGSTOP)
    (tmp_path / "new").write_text(json.dumps(other))
    os.replace(tmp_path / "new", lock)
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(10) == 1
    assert json.loads(lock.read_text()) == other


def test_lock_removed_by_hand_is_created_again(tmp_path):
    first = holder(tmp_path, "locks.SECONDS_BETWEEN_BEATS = 0.5")
    (tmp_path / "qad.lock").unlink()
    end = time.monotonic() + 10
    while not (tmp_path / "qad.lock").is_file():
        assert time.monotonic() < end
        time.sleep(0.1)
    first.kill()
    first.wait()


def test_one_of_several_processes_gets_a_stale_lock(tmp_path):
    first = holder(tmp_path)
    first.kill()
    first.wait()
    code = "import sys; from megatron_qad.engine.run_directory import locks; print('ready', flush=True); "
    code += "sys.stdin.read(); locks.lock_directory(sys.argv[1], '--save'); "
    code += "print('held', flush=True); import time; time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    racers = [subprocess.Popen(command, **pipes) for _ in range(4)]
    assert all(racer.stdout.readline() == b"ready\n" for racer in racers)  # all have finished their imports
    for racer in racers:
        racer.stdin.close()
    end = time.monotonic() + 60
    while sum(racer.poll() is None for racer in racers) > 1:
        assert time.monotonic() < end
        time.sleep(0.1)
    (winner,) = [racer for racer in racers if racer.poll() is None]
    assert winner.stdout.readline() == b"held\n"
    assert all(b"is in use by" in racer.stderr.read() for racer in racers if racer is not winner)
    winner.kill()
    winner.wait()


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc/1"), reason="needs /proc")
def test_unwritable_place_is_an_error():
    with pytest.raises(QADError, match=r"--output /proc/out: cannot be written"), locks.lock_output("/proc/out"):
        pass


@pytest.mark.parametrize("kind", ["dangling link", "link to a file", "directory", "pipe"])
def test_special_file_instead_of_a_lock_is_an_error(tmp_path, kind):
    """A process waited forever for the holder of a link that leads nowhere, and for the content of a pipe."""
    lock = tmp_path / ".out.lock"
    if "link" in kind:
        lock.symlink_to(tmp_path / "target")
        if kind == "link to a file":
            (tmp_path / "target").write_text("mine")
    else:
        os.mkfifo(lock) if kind == "pipe" else lock.mkdir()
    with pytest.raises(QADError, match=f"its lock file {lock} is a link or another special file.* Remove it."):
        with locks.lock_output(tmp_path / "out"):
            pass
    assert kind != "link to a file" or (tmp_path / "target").read_text() == "mine"


@pytest.mark.parametrize(
    "content", ["{}", '{"machine": MACHINE}', '{"machine": MACHINE, "start_ticks": 1}', "[" * 9999, "7"]
)
def test_lock_with_other_content_is_stale(tmp_path, monkeypatch, content):
    """It is not from a process of this version; on this machine nothing can tell whether its process still runs."""
    monkeypatch.setattr(locks, "SECONDS_UNTIL_STALE", 0)
    (tmp_path / ".out.lock").write_text(content.replace("MACHINE", json.dumps(locks._machine())))
    with locks.lock_output(tmp_path / "out"):
        assert json.loads((tmp_path / ".out.lock").read_text())["pid"] == os.getpid()
