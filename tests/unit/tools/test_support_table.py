"""The page docs/support.md is the one of its data, and claims nothing that no test shows."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOL = runpy.run_path(str(ROOT / "tools/support_table.py"))
TABLE = TOOL["read"]()


def test_page_is_made_from_the_data():
    assert TOOL["PAGE"].read_text() == TOOL["page"](TABLE), "run: python tools/support_table.py"


def test_cells_have_a_known_status_and_consumer():
    for row in TABLE["rows"]:
        assert row["cells"].keys() <= TABLE["consumers"].keys()
        for cell in row["cells"].values():
            status = cell if isinstance(cell, str) else next(iter(cell))
            assert status in TOOL["STATUSES"]
            assert isinstance(cell, dict) == (status in TOOL["TESTED"]), "tested cells, and no others, name a test"
            assert isinstance(cell, str) or len(cell) == 1


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """Ids of the tests in the files that the table names."""
    files = sorted({test.split("::")[0] for _, test in TOOL["claims"](TABLE)})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_each_claim_names_a_test_that_runs(collected):
    missing = [f"{status}: {test}" for status, test in TOOL["claims"](TABLE) if test not in collected]
    assert not missing, missing


def test_a_claim_without_a_test_would_be_found(collected):
    assert "tests/serve/test_llama_cpp.py::test_answers_match_the_decoded_weights[llama-fp8-modelopt]" not in collected
