"""What an import, a smoothing or an export was made of, in a small file of it: ``--keep`` keeps only what would be made
again.

A model is known by its small files and by samples of its weights, a saved iteration by its manifest, which has a sum of
every file: both cost well under a second, however large the weights. Names stand in the record for people, and the
sum of what came out for comparisons; what counts is the rest.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_qad.checkpoint.hf_reader import ASSETS, read_json
from megatron_qad.runtime import manifest
from megatron_qad.runtime.errors import QADError

_SAMPLE_BYTES, _NUM_SAMPLES = 1 << 16, 32
_NOT_ASKED = ("model", "checkpoint", "result")


def of_model(source: Path, dtype: str) -> dict[str, Any]:
    """The record of an import of the Hugging Face directory ``source``."""
    return {"model": source.resolve().name, "dtype": dtype, "sha256": _sum(_of_hf(source))}


def of_iteration(directory: Path, layout: str, job: dict) -> dict[str, Any]:
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


def of_smoothing(directory: Path, settings: dict[str, Any], formats: dict[str, str]) -> dict[str, Any]:
    """The record of a smoothed checkpoint.

    Args:
        directory: of the iteration that it is made of.
        settings: what was asked for, small and in words and numbers.
        formats: of every linear, by Megatron weight name: they say what is smoothed.
    """
    what = json.dumps(formats, sort_keys=True).encode()
    names = {"checkpoint": directory.parent.resolve().name, "iteration": directory.name}
    return names | settings | {"sha256": _sum([*_of_iteration(directory), what])}


def sum_of_iteration(directory: Path) -> str:
    return _sum(_of_iteration(directory))


def text_of(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"


def require_same(output: Path, record_name: str, expected: dict[str, Any]) -> None:
    """Refuse to keep ``output`` unless its record is ``expected``.

    Raises:
        QADError: says what it was made of and what was asked for.
    """
    file = output / record_name
    found = read_json(file) if file.is_file() else {}
    if _asked(found) != _asked(expected):
        was = f"was made of {_described(found)}" if found else f"has no {record_name} that says what it was made of"
        raise QADError(
            f"--keep: {output} {was}; asked for now is {_described(expected)}. Remove it, or choose another --output."
        )


def _asked(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _NOT_ASKED}


def _described(record: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value[:12] if key in ('sha256', 'result') else value}" for key, value in record.items())


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
