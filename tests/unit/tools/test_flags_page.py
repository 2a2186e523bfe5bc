"""Tests that docs/flags.md and the list of flag names are up to date with the code."""

import re
import runpy
from pathlib import Path

from megatron_qad.cli.early_checks import FLAG_NAMES
from megatron_qad.config.qad_options import QADOptions

ROOT = Path(__file__).parents[3]
TOOL = runpy.run_path(str(ROOT / "tools/flags_page.py"))


def test_page_of_flags_is_current():
    assert TOOL["PAGE"].read_text() == TOOL["page"](), "run: python tools/flags_page.py"


def test_list_of_names_is_current():
    assert FLAG_NAMES.read_text() == TOOL["flag_names"](), "run: python tools/flags_page.py"


def test_each_flag_has_one_row_and_a_meaning():
    rows = re.findall(r"^\| `--([a-z-]+)` \| .+ \| .+\. \|$", TOOL["page"](), re.MULTILINE)
    assert sorted(rows) == sorted(name.replace("_", "-") for name in QADOptions.__dataclass_fields__)
