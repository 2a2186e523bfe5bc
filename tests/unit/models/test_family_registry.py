"""The two registries of families list the same families and import neither each other nor Megatron."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_configs import TINY_OF_FAMILY

from megatron_qad.checkpoint import expected_tensors
from megatron_qad.checkpoint.expected_tensors import EXPECTED_TENSORS
from megatron_qad.models import families
from megatron_qad.models.families import FAMILIES, family_of

ROOT = Path(__file__).parents[3]
SHARED = {"__init__", "base", "dense_decoder", "router_options", "rope_config", "attention_heads"}
SHARED |= {"unbuilt", "nearest", "model_inventory", "radio_vision"}


def family_files(package) -> set[str]:
    return {file.stem for file in Path(package.__file__).parent.glob("*.py")} - SHARED


def test_both_packages_have_one_file_per_family():
    assert family_files(families) == family_files(expected_tensors) == set(TINY_OF_FAMILY)


def test_every_family_is_registered():
    for package, registry in ((families, FAMILIES.values()), (expected_tensors, EXPECTED_TENSORS.values())):
        files = {name: getattr(package, name) for name in family_files(package)}
        members = [getattr(m, "FAMILY", None) or m.expected_tensors for m in files.values()]
        assert len(registry) == len(members) and all(member in registry for member in members)


@pytest.mark.parametrize("name", TINY_OF_FAMILY)
def test_config_selects_its_family(name):
    config = TINY_OF_FAMILY[name]
    assert family_of(config) is getattr(families, name).FAMILY
    assert EXPECTED_TENSORS[config["model_type"]] is getattr(expected_tensors, name).expected_tensors


@pytest.mark.parametrize("name", TINY_OF_FAMILY)
def test_name_map_matches_validator_inventory(name, assert_same_tensors, assert_round_trip):
    assert_same_tensors(TINY_OF_FAMILY[name])
    assert_round_trip(TINY_OF_FAMILY[name])


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("megatron_qad.models.families", "megatron"),
        ("megatron_qad.checkpoint.expected_tensors", "megatron"),
        ("megatron_qad.checkpoint.expected_tensors", "megatron_qad.models"),
    ],
)
def test_imports_without(module, missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nimport {module}; print('imported')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout) == (0, "imported\n"), result.stderr


def test_inventory_never_imports_models():
    """Also covers imports inside functions, which importing the package does not execute."""
    for file in Path(expected_tensors.__file__).parent.glob("*.py"):
        assert "megatron_qad.models" not in file.read_text(), file
