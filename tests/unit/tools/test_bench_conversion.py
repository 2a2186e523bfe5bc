"""Memory of import and export, as tools/bench_conversion.py measures it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20


@pytest.mark.all
def test_conversions_hold_two_tensors_and_not_the_model():
    """The model has 0.9 GB, its largest tensor 250 MiB: a conversion that held the model would need 870 MiB or more.

    256 MiB are for what libraries allocate on first use, and for heaps that do not shrink.
    """
    command = [sys.executable, "tools/bench_conversion.py", "--blocks", "1", "--vocab", "32000"]
    completed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert completed.returncode == 0, completed.stderr[-3000:]
    table = [line.split("|") for line in completed.stdout.splitlines() if line.startswith(("| import", "| export"))]
    memory = {row[1].strip(): int(row[7].split()[0]) * MIB for row in table}
    assert memory.keys() == {"import", "export"}
    assert all(0 < size <= 2 * 250 * MIB + 256 * MIB for size in memory.values()), memory
