"""Runs the KL kernels in Triton's interpreter and compiles them, both without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker_kl_triton.py")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("job", ["interpret", "compile"])
def test_kernels(job, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = "1" if job == "interpret" else "0"
    result = subprocess.run(
        [sys.executable, str(WORKER), job], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith("passed")
