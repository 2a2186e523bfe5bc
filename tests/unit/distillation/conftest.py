"""docs/losses.md as data."""

import re
from pathlib import Path

import pytest

LOSSES_PAGE = Path(__file__).parents[3] / "docs" / "losses.md"


@pytest.fixture
def documented_losses() -> dict[str, tuple[tuple[str, ...], str]]:
    """The table of docs/losses.md: name -> (settings, what it is), in the page's order."""
    rows = {}
    for line in LOSSES_PAGE.read_text().splitlines():
        if line.startswith("| `"):
            name, settings, description = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            rows[name.strip("`")] = (tuple(filter(None, settings.split(", "))), description.replace("\\|", "|"))
    return rows
