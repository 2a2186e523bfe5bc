"""Small JSON files that describe a directory, each with a checksum of its own content.

Without a checksum, a flipped bit in a name would go unnoticed. It also covers the file name, so that exchanged records
are detected.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.text_files import parse_json, read_text


def to_text(name: str, content: Any) -> str:
    """Return the text of the record ``name``: a JSON object of "sha256" and "content"."""
    return json.dumps({"sha256": _sum(name, content), "content": content}, indent=1) + "\n"


def write(file: Path, content: Any) -> None:
    """Write a record atomically."""
    manifest.write_atomically(file, to_text(file.name, content))


def write_or_warn(file: Path, content: Any) -> None:
    """Write an optional record: an error, such as a full disk, is logged and does not stop the job."""
    manifest.write_or_warn(file, to_text(file.name, content))


def read(file: Path) -> Any:
    """Return the content of a record.

    Raises:
        QADError: the file is missing, unreadable or damaged.
    """
    record = parse_json(read_text(file), f"{file}: is damaged", advice="")
    if not isinstance(record, dict) or set(record) != {"sha256", "content"}:
        raise QADError(f'{file}: is damaged, or is not a record of megatron_qad (expected "sha256" and "content")')
    if record["sha256"] != _sum(file.name, record["content"]):
        raise QADError(f"{file}: is damaged (its content has a different SHA-256 from when it was written)")
    return record["content"]


def _sum(name: str, content: Any) -> str:
    return hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()
