"""Check every file of an export against the sizes and SHA-256 that the exporter recorded; called by ``validate``.

Files that the record does not list, such as a model card that was added later, are not examined.
"""

from pathlib import Path

from megatron_qad.checkpoint.hf_directory import AddIssue
from megatron_qad.checkpoint.provenance import find_export_problems
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.run_files import EXPORT_FILE

_ADVICE = "Export again, or pass --no-sums if files were edited on purpose"


def check_sums(directory: Path, issue: AddIssue) -> None:
    """Report files that are missing or have changed since the export, and an export without a record of its files."""
    if not (directory / EXPORT_FILE).is_file():
        issue(EXPORT_FILE, f"is missing, so changes of files since the export cannot be found. {_ADVICE}")
        return
    try:
        problems = find_export_problems(directory)
    except QADError as error:
        issue(EXPORT_FILE, f"{str(error).removeprefix(f'{directory / EXPORT_FILE}: ').rstrip('.')}. {_ADVICE}")
        return
    for name, problem in problems.items():
        issue(name, f"{problem}. {_ADVICE}")
