"""Runs scripts of this folder with the python of the serving environment (tools/setup_serving_env.sh)."""

import functools
import json
import os
import subprocess
from pathlib import Path

import pytest
from launch import ROOT


@functools.cache
def serving_python() -> str:
    """Return the interpreter; create the environment if it is missing, which takes minutes. Skips with QAD_NO_SERVE."""
    if os.environ.get("QAD_NO_SERVE"):
        pytest.skip("QAD_NO_SERVE is set")
    done = subprocess.run([ROOT / "tools/setup_serving_env.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return f"{done.stdout.strip().splitlines()[-1]}/bin/python"


def run_script(script: str, requests: list[dict], directory: Path, timeout: int = 600) -> str:
    """Run tests/serve/SCRIPT with a list of requests; return what it printed."""
    file = directory / f"{script}.json"
    file.write_text(json.dumps(requests, default=str))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [serving_python(), str(ROOT / "tests/serve" / script), str(file)]
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
    return done.stdout + done.stderr
