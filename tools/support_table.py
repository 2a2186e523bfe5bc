"""Writes docs/support.md, the table of which server reads which export: ``python tools/support_table.py``.

The data is tools/support.yaml. tests/unit/tools/test_support_table.py compares the page with it, and the claims with
the tests.
"""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DATA, PAGE = ROOT / "tools/support.yaml", ROOT / "docs/support.md"
STATUSES = {
    "served": "a test compares the answers with ours",
    "loaded": "a test compares every tensor that its loader holds with the export, without a forward pass",
    "refused": "a test shows that it stops with an error",
    "tried": "it was run by hand once; no test repeats it",
    "read": "its source was read, or its code that matches names was run; no model was",
    "not known": "nobody looked",
    "no": "it does not read this",
}
"""Status of a cell -> its meaning. The first three name the test."""
TESTED = ("served", "loaded", "refused")


def read() -> dict:
    return yaml.safe_load(DATA.read_text(encoding="utf-8"))


def claims(table: dict) -> list[tuple[str, str]]:
    """Return (status, test) of every cell that names a test."""
    cells = [cell for row in table["rows"] for cell in row["cells"].values()]
    return [(status, test) for cell in cells if isinstance(cell, dict) for status, test in cell.items()]


def page(table: dict) -> str:
    """Return the page as Markdown."""
    consumers = table["consumers"]
    lines = [
        "# Which server reads which export",
        "This page is made from `tools/support.yaml` by `python tools/support_table.py`. A test fails if a cell claims",
        "more than a test shows. The tests ran on CPUs; no server has read an export on a GPU.",
        "",
        *(f"- **{status}**: {meaning}." for status, meaning in STATUSES.items()),
        "",
        "| family | formats | layout | " + " | ".join(consumers) + " |",
        "|---" * (3 + len(consumers)) + "|",
    ]
    for row in table["rows"]:
        cells = [_text(row["cells"].get(consumer, "not known")) for consumer in consumers]
        lines.append("| " + " | ".join([row["family"], row["formats"], row["layout"], *cells]) + " |")
    lines += ["", "## Versions", "| consumer | least version that was looked at | notes |", "|---|---|---|"]
    lines += [f"| {name} | {about['version']} | {about['notes']} |" for name, about in consumers.items()]
    lines += ["", "## GPUs", "| generation | vLLM 0.32 with NVFP4 weights and inputs (W4A4) | known |", "|---|---|---|"]
    lines += [f"| {gpu['generation']} | {gpu['what']} | {gpu['known']} |" for gpu in table["gpus"]]
    return "\n".join([*lines, "", *table["notes"]]) + "\n"


def _text(cell: str | dict) -> str:
    return cell if isinstance(cell, str) else next(iter(cell))


if __name__ == "__main__":
    PAGE.write_text(page(read()), encoding="utf-8")
