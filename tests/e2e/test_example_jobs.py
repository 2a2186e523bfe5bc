"""examples/jobs.py: no job runs on after the runner has ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WAITS = "import os, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(600)\n"
FAILS = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).is_file():
    time.sleep(0.05)
sys.exit("error: this job always fails")
"""
LIMIT = 60
"""Seconds to wait. A killed process ends at once, but a busy machine needs long to start one."""


@pytest.mark.parametrize("end", ["a job fails", "SIGTERM", "SIGKILL"])
def test_no_job_outlives_the_runner(tmp_path, end):
    (tmp_path / "jobs").mkdir()
    jobs = {"waits": WAITS} | ({"fails": FAILS} if end == "a job fails" else {})
    for name, text in jobs.items():
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "jobs" / name).write_text(f"{name} 1 '' {tmp_path}/{name}.py {tmp_path}/process\n")
    command = [sys.executable, str(ROOT / "examples/jobs.py"), str(tmp_path), ",".join(jobs)]
    runner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: (tmp_path / "process").is_file() and (tmp_path / "process").read_text())
    if end != "a job fails":
        os.kill(runner.pid, getattr(signal, end))
    output, _ = runner.communicate(timeout=LIMIT)
    assert runner.returncode != 0
    if end == "a job fails":
        assert "error: this job always fails" in output and "error: fails failed" in output
    wait_until(lambda: has_ended((tmp_path / "process").read_text()))


def has_ended(process: str) -> bool:
    stat = Path("/proc", process, "stat")
    return not stat.is_file() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def wait_until(is_so) -> None:
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < LIMIT, "too late"
        time.sleep(0.05)
