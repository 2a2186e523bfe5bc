"""Tests that docs/shipped_policies.md is up to date, and that its table has the formats that models get."""

import json
import runpy
from pathlib import Path

import pytest

from megatron_qad.models.families import family_of
from megatron_qad.quantization.policy import Policy, resolve

ROOT = Path(__file__).parents[3]
TOOL = runpy.run_path(str(ROOT / "tools/policies_page.py"))
CONFIGS = sorted((ROOT / "tests/unit/quantization").glob("configs*/*.json"))


def test_page_of_policies_is_current():
    assert TOOL["PAGE"].read_text() == TOOL["page"](), "run: python tools/policies_page.py"


def test_every_policy_says_for_which_models_it_is():
    for file in TOOL["shipped"]():
        assert "models: " in file.read_text() and ("source: " in file.read_text() or file.stem == "bf16")


@pytest.mark.parametrize(
    "file",
    [file for file in CONFIGS if (ROOT / "megatron_qad/quantization/policies" / f"{file.stem}.yaml").is_file()],
    ids=lambda file: file.stem,
)
def test_table_agrees_with_the_formats_of_the_model(file):
    """All layers of a kind in the policy's model have the format of the cell, unless it has an asterisk."""
    config, policy = json.loads(file.read_text()), Policy.load(file.stem)
    family = family_of(config)
    linears = family.linears(config)
    formats = resolve(policy, linears, family.layer_kinds(config))
    for kind in TOOL["PROJECTIONS"]:
        found = {formats[linear.megatron] for linear in linears if linear.kind == kind}
        cell = TOOL["cell"](policy, kind)
        if found:
            assert cell.split()[0] in found and (len(found) > 1) == cell.endswith("*"), (kind, cell, found)
