"""Provenance records: what an import, a smoothing or an export was made from (for ``--reuse-existing``).

A model is known by its small files and by samples of its weights, a saved iteration by its manifest, which has a sum of
every file: both cost well under a second, however large the weights. Names stand in the record for people, and the
sum of what came out for comparisons; what counts is the rest.
"""

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_qad.checkpoint.hf_reader import ASSETS
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.run_directory.run_files import EXPORT_FILE

_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 16, 32
_NOT_ASKED = ("model", "checkpoint", "result", "files")


def model_provenance(source: Path, dtype: str) -> dict[str, Any]:
    """The record of an import of the Hugging Face directory ``source``."""
    return {"model": source.resolve().name, "dtype": dtype, "sha256": _sum(_of_hf(source))}


def iteration_provenance(directory: Path, layout: str, job: dict) -> dict[str, Any]:
    """The record of an export.

    Args:
        directory: of the iteration, beside whose checkpoint directory's ``hf/`` it stands.
        job: what ``qad.json`` says of the formats.
    """
    formats = json.dumps([job.get(key) for key in ("formats", "kv_cache", "scale_rule")], sort_keys=True).encode()
    return {
        "checkpoint": directory.parent.resolve().name,
        "iteration": directory.name,
        "layout": layout,
        "sha256": _sum([*_of_iteration(directory), formats, *_of_hf(directory.parent / "hf")]),
    }


def smoothing_provenance(directory: Path, settings: dict[str, Any], formats: dict[str, str]) -> dict[str, Any]:
    """The record of a smoothed checkpoint.

    Args:
        directory: of the iteration that it is made of.
        settings: what was asked for, small and in words and numbers.
        formats: of every linear, by Megatron weight name: they say what is smoothed.
    """
    what = json.dumps(formats, sort_keys=True).encode()
    names = {"checkpoint": directory.parent.resolve().name, "iteration": directory.name}
    return names | settings | {"sha256": _sum([*_of_iteration(directory), what])}


def iteration_sha256(directory: Path) -> str:
    return _sum(_of_iteration(directory))


def check_same_provenance(output: Path, record_name: str, expected: dict[str, Any]) -> None:
    """Refuse to keep ``output`` unless its record is ``expected`` and all its files are as they were written.

    Raises:
        QADError: says what it was made of and what was asked for, or which file is damaged.
    """
    file = output / record_name
    found = json_records.read(file) if file.is_file() else {}
    if _asked(found) != _asked(expected):
        was = f"was made of {_described(found)}" if found else f"has no {record_name} that says what it was made of"
        raise QADError(
            f"--reuse-existing: {output} {was}; asked for now is {_described(expected)}. Remove it, or choose another "
            "--output."
        )
    if record_name == EXPORT_FILE:
        wrong = [f"{name} {what}" for name, what in find_export_problems(output).items()]
    else:
        wrong = [
            *manifest.find_problems(output / "release"),
            *manifest.find_problems(output / "hf", needed=["config.json"]),
        ]
    if wrong:
        raise QADError(
            f"--reuse-existing: {output} is damaged: {'; '.join(wrong[:3])}. Remove it, and it is made again."
        )


def find_export_problems(output: Path, only: str = "*") -> dict[str, str]:
    """Files of an export that are not what was written, with a phrase each; none where its record has no sums.

    Args:
        only: pattern of the files' names that are looked at.
    """
    file = output / EXPORT_FILE
    sums = json_records.read(file).get("files", {}) if file.is_file() else {}
    sums = {name: (size, digest) for name, (size, digest) in sums.items() if fnmatch(name, only)}
    missing = [name for name in sums if not (output / name).is_file()]
    found = manifest.sums_of(output, [name for name in sums if name not in missing])
    changed = {name: "is not as it was written" for name in found if found[name] != sums[name]}
    return dict.fromkeys(missing, "is missing") | changed


def _asked(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _NOT_ASKED}


def _described(record: dict[str, Any]) -> str:
    short = {
        key: value[:12] if key in ("sha256", "result") else value for key, value in record.items() if key != "files"
    }
    return ", ".join(f"{key} {value}" for key, value in short.items())


def _of_iteration(directory: Path) -> list[bytes]:
    sums = directory / manifest.FILE
    if sums.is_file():
        return [sums.read_bytes()]
    # Saved by something else: a copy counts as another.
    stats = [(file.name, file.stat()) for file in sorted(directory.iterdir())]
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}".encode() for name, stat in stats]


def _of_hf(directory: Path) -> Iterable[bytes]:
    """Small files whole; of each file of weights name, size and samples from begin to end."""
    files = {path for pattern in (*ASSETS, "*.safetensors*") for path in directory.glob(pattern)}
    for path in sorted(part for file in files for part in ([file] if file.is_file() else file.rglob("*"))):
        if not path.is_file():
            continue
        size = path.stat().st_size
        yield f"{path.relative_to(directory)} {size}".encode()
        with path.open("rb") as stream:
            if path.suffix != ".safetensors":
                yield stream.read()
            else:
                for i in range(_NUM_SAMPLES):
                    stream.seek(max(size - _SAMPLE_BYTES, 0) * i // (_NUM_SAMPLES - 1))
                    yield stream.read(_SAMPLE_BYTES)


def _sum(parts: Iterable[bytes]) -> str:
    """Of the parts' own sums, so that no two lists of parts run together."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
