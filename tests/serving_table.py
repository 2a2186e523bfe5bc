"""The table of what was served, printed at the end of a test run and written as JSON.

Tests add rows with ``record_property("served", {"family": ..., "layout": ..., "served": ..., "kl": ..., ...})``;
pytest-xdist passes them on to the process that prints.
"""

import json
from collections.abc import Iterable
from pathlib import Path

JSON_FILE = Path(__file__).resolve().parents[1] / "runs" / "serving_table.json"
_COLUMNS = {"family": "", "layout": "", "served": "", "kl": ".2g", "largest": ".2g", "top1": ".4f"}
_TITLES = ("model", "export layout", "served by", "KL", "largest difference", "same top-1")


def rows_of(reports: Iterable) -> list[dict]:
    """Return the rows that the reports of tests carry."""
    return [row for report in reports for key, row in getattr(report, "user_properties", ()) if key == "served"]


def table(rows: list[dict]) -> list[str]:
    """Return the lines of a Markdown table."""
    cells = [[format(row[name], spec) for name, spec in _COLUMNS.items()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in [_TITLES, ["---"] * len(_TITLES), *cells]]


def report(terminal) -> None:
    """Print the table of a run and write it to ``JSON_FILE``; without rows do nothing."""
    rows = rows_of(terminal.stats.get("passed", []) + terminal.stats.get("failed", []))
    if not rows:
        return
    terminal.section("exports served by real engines (log-probabilities against the student in Megatron)")
    for line in table(rows):
        terminal.write_line(line)
    try:
        JSON_FILE.parent.mkdir(exist_ok=True)
        JSON_FILE.write_text(json.dumps(rows, indent=1) + "\n")
    except OSError as error:
        terminal.write_line(f"the table was not written: {error}")
