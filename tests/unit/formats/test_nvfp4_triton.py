"""The Triton kernels without a GPU: results in Triton's interpreter, and the PTX from the compiler.

In the interpreter, float32 and float16 must equal the reference bit for bit. bfloat16 must equal the truncated float32
reference, because the interpreter casts by truncation. tests/gpu has the tests that need a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("worker_triton.py")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("job", ["interpret", "compile"])
def test_kernels(job, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = "1" if job == "interpret" else "0"
    done = subprocess.run(
        [sys.executable, str(WORKER), job], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("passed")
