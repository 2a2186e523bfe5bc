"""The runner of the examples' jobs (examples/jobs.py)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WAITS = "import os, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(600)\n"
FAILS = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).is_file():
    time.sleep(0.05)
sys.exit("error: on purpose")
"""


def test_a_failure_ends_the_other_jobs(tmp_path):
    (tmp_path / "jobs").mkdir()
    for name, text in {"waits": WAITS, "fails": FAILS}.items():
        (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "jobs" / name).write_text(f"{name} 1 '' {tmp_path}/{name}.py {tmp_path}/process\n")
    command = [sys.executable, str(ROOT / "examples/jobs.py"), str(tmp_path), "waits,fails"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "error: on purpose" in result.stdout and "error: fails failed" in result.stderr
    assert not Path("/proc", (tmp_path / "process").read_text()).exists(), "the other job still runs"
