"""Provenance records of imports, smoothed checkpoints and exports, which allow ``--reuse-existing``.

A model is identified by its small files and samples of its weights, a saved iteration by its manifest, which has a hash
of every file. Both take well under a second for weights of any size. Names in a record are for information only, and
hashes of the output are used to detect damage; the remaining entries must match for an output to be reused.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_qad.checkpoint.hf_reader import ASSETS
from megatron_qad.checkpoint.weight_files import weight_files
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.run_directory.iterations import smoothing_record
from megatron_qad.engine.run_directory.run_files import EXPORT_FILE
from megatron_qad.engine.text_files import read_json

_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 16, 32
_INFORMATIVE_KEYS = ("model", "checkpoint", "result", "files", "max_movement", "smoothing")


def model_provenance(source: Path, dtype: str) -> dict[str, Any]:
    """Return the provenance record of an import of the Hugging Face directory ``source``."""
    weights = weight_files(source, read_json(source / "config.json"))  # an index may name files in subdirectories
    return {"model": source.resolve().name, "dtype": dtype, "sha256": _digest(_hf_parts(source, weights))}


def megatron_provenance(directory: Path, assets: Path, dtype: str) -> dict[str, Any]:
    """Return the provenance record of an import of an iteration that Megatron saved.

    Args:
        directory: directory of the iteration.
        assets: Hugging Face directory with config and tokenizer.
    """
    names = {"checkpoint": directory.parent.resolve().name, "iteration": directory.name, "dtype": dtype}
    return names | {"sha256": _digest([*_iteration_parts(directory), *_hf_parts(assets)])}


def iteration_provenance(directory: Path, layout: str, job: dict) -> dict[str, Any]:
    """Return the provenance record of an export.

    Args:
        directory: directory of the iteration, next to ``hf/`` in the checkpoint directory.
        job: contents of ``qad.json``.
    """
    return {
        "checkpoint": directory.parent.resolve().name,
        "iteration": directory.name,
        "layout": layout,
        "sha256": _digest([*_iteration_parts(directory), _export_settings(job), *_hf_parts(directory.parent / "hf")]),
    }


def trainer_provenance(checkpoint: Path, layout: str, job: dict) -> dict[str, Any]:
    """Return the provenance record of an export of a checkpoint that QADTrainer saved. Arguments as above."""
    parts = [*_hf_parts(checkpoint), _export_settings(job), *_hf_parts(checkpoint / "hf")]
    return {"checkpoint": checkpoint.resolve().name, "layout": layout, "sha256": _digest(parts)}


def _export_settings(job: dict) -> bytes:
    """Return data that identifies the entries of ``qad.json`` that an export depends on."""
    entries = [job.get(key) for key in ("formats", "kv_cache", "scale_rule")]
    entries += [job["scales"]] if "scales" in job else []  # exports of runs without it keep their record
    return json.dumps(entries, sort_keys=True).encode()


def starting_point(directory: Path, job: dict) -> dict[str, Any]:
    """Return the entries of an export's record that ``validate --against`` needs.

    Args:
        directory: directory of the iteration.
        job: contents of ``qad.json``.
    """
    smoothing, number = smoothing_record(directory.parent), directory.name.removeprefix("iter_")
    num_steps = int(number) if number.isdigit() else None
    return _starting_point(job, num_steps, None if smoothing is None else smoothing.get("result"))


def trainer_starting_point(job: dict) -> dict[str, Any]:
    """Return the entries of ``starting_point`` for a checkpoint of QADTrainer, whose ``qad.json`` has them all."""
    return _starting_point(job, job.get("num_steps"), job.get("smoothing"))


def _starting_point(job: dict, num_steps: int | None, smoothing: str | None) -> dict[str, Any]:
    max_lr = job.get("max_lr")
    return {
        # The largest distance by which training can have moved a weight. None: unknown.
        "max_movement": max_lr * num_steps if max_lr is not None and num_steps is not None else None,
        # Identifies the smoothed weights that training began from. None: they were not smoothed.
        "smoothing": smoothing,
    }


def smoothing_provenance(directory: Path, settings: dict[str, Any], formats: dict[str, str]) -> dict[str, Any]:
    """Return the provenance record of a smoothed checkpoint.

    Args:
        directory: directory of the iteration that was smoothed.
        settings: requested settings, as short strings and numbers.
        formats: format of every linear by Megatron weight name, which determines the smoothed layers.
    """
    encoded_formats = json.dumps(formats, sort_keys=True).encode()
    names = {"checkpoint": directory.parent.resolve().name, "iteration": directory.name}
    return names | settings | {"sha256": _digest([*_iteration_parts(directory), encoded_formats])}


def iteration_sha256(directory: Path) -> str:
    """Return a hash that identifies a saved iteration."""
    return _digest(_iteration_parts(directory))


def check_same_provenance(output: Path, record_name: str, expected: dict[str, Any]) -> None:
    """Check that the record of ``output`` matches ``expected`` and that none of its files is damaged.

    Raises:
        QADError: the output has other provenance, or a file is damaged.
    """
    file = output / record_name
    record = json_records.read(file) if file.is_file() else {}
    if _identity(record) != _identity(expected):
        actual = f"was made from {_describe(record)}" if record else f"has no provenance record ({record_name})"
        raise QADError(
            f"--reuse-existing: {output} {actual}; expected {_describe(expected)}. Remove it, or choose another "
            "--output."
        )
    if record_name == EXPORT_FILE:
        # The records of early versions list no files.
        found = find_export_problems(output) if "files" in record else {}
        problems = [f"{name} {problem}" for name, problem in found.items()]
    else:
        problems = [
            *manifest.find_problems(output / "release"),
            *manifest.find_problems(output / "hf", needed=["config.json"]),
        ]
    if problems:
        raise QADError(
            f"--reuse-existing: {output} is damaged: {'; '.join(problems[:3])}. Remove it to create it again."
        )


def find_export_problems(output: Path) -> dict[str, str]:
    """Return {file: problem} for the files of an export that are missing or differ from its record.

    Raises:
        QADError: the record is missing, damaged, or lists no files.
    """
    file = output / EXPORT_FILE
    record = json_records.read(file)
    sums = record.get("files") if isinstance(record, dict) else None
    if not isinstance(sums, dict) or not sums:
        raise QADError(f"{file}: lists no files with their SHA-256, as records of this version do.")
    present = [name for name in sums if (output / name).is_file()]
    actual = manifest.sums_of(output, present)
    problems = dict.fromkeys((name for name in sums if name not in actual), "is missing")
    return problems | {
        name: "has changed since it was written (another SHA-256)"
        for name in present
        if list(actual[name]) != sums[name]
    }


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that must match."""
    return {key: value for key, value in record.items() if key not in _INFORMATIVE_KEYS}


def _describe(record: dict[str, Any]) -> str:
    short = {
        key: value[:12] if key in ("sha256", "result") else value
        for key, value in record.items()
        if key not in ("files", "max_movement", "smoothing")
    }
    return ", ".join(f"{key} {value}" for key, value in short.items())


def _iteration_parts(directory: Path) -> list[bytes]:
    """Return data that identifies a saved iteration."""
    manifest_file = directory / manifest.FILE
    if manifest_file.is_file():
        return [manifest_file.read_bytes()]
    # Saved by other software without a manifest: file times are included, so a copy has another identity.
    stats = [(file.name, file.stat()) for file in sorted(directory.iterdir())]
    return [f"{name} {stat.st_size} {stat.st_mtime_ns}".encode() for name, stat in stats]


def _hf_parts(directory: Path, weights: Iterable[Path] = ()) -> Iterable[bytes]:
    """Yield data that identifies a Hugging Face directory: small files, and name, size and samples of weight files.

    Args:
        weights: weight files that are not directly in the directory.
    """
    files = {path for pattern in (*ASSETS, "*.safetensors*") for path in directory.glob(pattern)} | set(weights)
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


def _digest(parts: Iterable[bytes]) -> str:
    """Return the SHA-256 of the parts' hashes, so that different lists of parts never give the same input."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
