"""Small JSON files that describe a directory, each with a checksum of its own content.

A flipped bit in a name would otherwise be another name. The checksum also covers the file's name, so that two records
that were exchanged are noticed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest


def to_text(name: str, content: Any) -> str:
    """The text of the record ``name``: a JSON object of "sha256" and "content"."""
    return json.dumps({"sha256": _sum(name, content), "content": content}, indent=1) + "\n"


def write(file: Path, content: Any) -> None:
    manifest.write_atomically(file, to_text(file.name, content))


def write_or_warn(file: Path, content: Any) -> None:
    """``write`` of what a job can do without: a full disk is said and is no reason to stop."""
    manifest.write_or_warn(file, to_text(file.name, content))


def read(file: Path) -> Any:
    """The content of a record.

    Raises:
        QADError: the file is missing or unreadable, or is not what was written.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise QADError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise QADError(f"{file}: is damaged (not valid JSON: {error})") from error
    if not isinstance(found, dict) or set(found) != {"sha256", "content"}:
        raise QADError(f'{file}: is damaged, or no record of megatron_qad (expected "sha256" and "content")')
    if found["sha256"] != _sum(file.name, found["content"]):
        raise QADError(f"{file}: is damaged (its content has another SHA-256 than when it was written)")
    return found["content"]


def _sum(name: str, content: Any) -> str:
    return hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()
