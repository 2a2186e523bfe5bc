"""The figures of the documentation are those that the tool draws, from the figures of the benchmark's page."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[3] / "tools/docs_figures.py"))


@pytest.mark.parametrize("name", TOOL["FIGURES"])
def test_figures_are_current(name):
    svg = TOOL["FIGURES"][name]().svg()
    ElementTree.fromstring(svg)
    assert (TOOL["IMAGES"] / name).read_text() == svg, "run: python tools/docs_figures.py"


def test_the_curve_has_the_steps_of_both_runs():
    assert {name: len(values) for name, values in TOOL["kl_curves"]().items()} == {"original": 10, "smoothed": 9}
