"""The ranges in pyproject.toml agree with the list of versions that were tried."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from megatron_qad.engine.patches import PATCHES
from megatron_qad.engine.tried_versions import TRIED, supported_versions

ROOT = Path(__file__).parents[3]
REQUIREMENTS = {
    requirement.name: requirement.specifier
    for requirement in map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
}


def test_ranges_contain_the_supported_versions_only():
    for tried in TRIED:
        assert (tried.version in REQUIREMENTS[tried.package]) == tried.supported, (tried.package, tried.version)


def test_supported_versions_agree_with_every_row():
    """The table has one source for each attribute, so a version with another source cannot be supported."""
    assert all(tried.rows == "none" for tried in TRIED if tried.supported)


def test_supported_versions_are_older_than_that_of_the_table():
    """Installation takes the newest version of a range, which the table must describe."""
    for patch in PATCHES:
        for other in supported_versions(patch.package):
            assert Version(other) < Version(patch.version) and patch.version in REQUIREMENTS[patch.package]
