"""The losses in docs and help texts, as data."""

import re
from pathlib import Path

import pytest

import megatron_qad

ROOT = Path(megatron_qad.__file__).parents[1]


@pytest.fixture
def parse_loss_table():
    """Return a parser of tables as in docs/losses.md: text -> {name: (settings, description)}, in order."""

    def parse(text: str) -> dict[str, tuple[tuple[str, ...], str]]:
        rows = {}
        for line in text.splitlines():
            if line.startswith("| `"):
                name, settings, description = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
                rows[name.strip("`")] = (tuple(filter(None, settings.split(", "))), description.replace("\\|", "|"))
        return rows

    return parse


@pytest.fixture
def documented_losses(parse_loss_table):
    """The table of docs/losses.md."""
    return parse_loss_table((ROOT / "docs" / "losses.md").read_text())


@pytest.fixture
def help_texts() -> str:
    """Source of megatron_qad/config, whose docstrings are the help texts of the flags."""
    return "".join(file.read_text() for file in (ROOT / "megatron_qad" / "config").rglob("*.py"))
