"""Writes the table of ``patches`` as the page ``docs/patches.md``."""

from megatron_qad.engine.patches import PATCHES, STAND_INS
from megatron_qad.engine.tried_versions import TRIED


def page() -> str:
    """``docs/patches.md``: the table as Markdown, one section per package."""
    lines = [
        "# Patches",
        "",
        "This page lists everything that megatron_qad replaces in other packages. `make patches-page` generates it",
        "from the table in `megatron_qad/engine/patches.py`. A test compares each row with the installed packages and",
        "fails if a new version has changed the replaced code.",
    ]
    for package in dict.fromkeys(f"{patch.package} {patch.version}" for patch in PATCHES):
        header = "| replaced | why | replaced in | can be removed when |"
        lines += ["", f"## {package}", "", header, "|---|---|---|---|"]
        for patch in PATCHES:
            if f"{patch.package} {patch.version}" == package:
                names = ", ".join(f"`{name}`" for name in patch.names)
                why = f"{patch.why} ({patch.issue})" if patch.issue else patch.why
                lines.append(f"| `{patch.owner}`: {names} | {why} | `{patch.where}` | {patch.until} |")
    header = "| module | why | implemented in | can be removed when |"
    lines += ["", "## Replaced or hidden modules", "", header, "|---|---|---|---|"]
    for stand_in in STAND_INS:
        lines.append(f"| `{stand_in.module}` | {stand_in.why} | `{stand_in.where}` | {stand_in.until} |")
    lines += ["", "## Other versions that were tried", ""]
    lines += [
        "`pyproject.toml` allows a version if every row agrees with it and the tests pass that were run with it. The"
    ]
    lines += ["[lab log](lab_log.md#other-versions) has the commands."]
    lines += ["", "| version | allowed | rows that differ | result |", "|---|---|---|---|"]
    for tried in TRIED:
        allowed = "yes" if tried.supported else "no"
        lines.append(f"| {tried.package} {tried.version} | {allowed} | {tried.rows} | {tried.result} |")
    return "\n".join(lines) + "\n"
