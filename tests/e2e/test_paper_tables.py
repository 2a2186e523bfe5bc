"""Runs every experiment of examples/paper_tables with few problems and two training steps."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_modules import imports_of_examples

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/paper_tables"
MINUTES = 20
"""Time limit. Measured on busy machines: two to three minutes."""


@pytest.fixture(scope="module")
def example():
    """Return the example's modules by name."""
    with imports_of_examples("paper_tables"):
        return {name: importlib.import_module(name) for name in ("experiments", "problems")}


@pytest.mark.timeout(60 * MINUTES)
def test_every_table_in_two_steps(tmp_path, example):
    """Every table is complete, and a second call runs no job."""
    command = [sys.executable, str(EXAMPLE / "run.py"), "all", "--trial", "--output", str(tmp_path / "out")]
    first, second = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for _ in range(2)
    )
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-2000:]
    assert second.returncode == 0 and "models/pretrained:" in first.stdout
    assert [line for line in second.stdout.splitlines() if line.startswith("[")] == [], "jobs ran again"
    for name, table in example["experiments"].TABLES.items():
        lines = (tmp_path / "out/tables" / f"{name}.md").read_text().splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
        assert [row[0] for row in rows] == list(table.rows.values())
        assert all(float(row[3]) > 0 for row in rows), "cross entropies"


def test_answers_in_steps_are_right_and_spoiled_ones_are_not(example):
    import numpy as np

    problems, rng = example["problems"], np.random.default_rng(0)
    for domain, make in problems.RANDOM.items():
        for problem in (make(rng) for _ in range(200)):
            chat = {"result": problem.result}
            for answer in (problem.at_once, problem.in_steps):
                assert problems.is_right(chat | {"messages": [{"content": answer}]})
            spoiled = problems.spoiled(problem, problem.at_once, rng)
            assert not problems.is_right(chat | {"messages": [{"content": spoiled}]}), (domain, problem)
    assert problems.Problem("sums", "4821+1793", "6614").in_steps == "1+3+0=04;2+9+0=11;8+7+1=16;4+1+1=06;6614"
