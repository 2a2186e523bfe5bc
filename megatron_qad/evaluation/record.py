"""The record of one evaluation: metrics of every counted token, and the rows of tokens that the model read.

A record is a directory with two files: ``evaluation.json`` (``json_records``) and ``tokens.npz``, whose hash the first
one has.
"""

import dataclasses
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_qad.distillation.token_metrics import TOKEN_METRICS
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest, new_files
from megatron_qad.engine.system_errors import naming

RECORD_FILE, TOKENS_FILE = "evaluation.json", "tokens.npz"
INTEGERS = ("row", "column", "position", "label", "student_top", "teacher_top")
"""Of every counted token, int32: its row and column in ``rows``, its position in its document, the label, and the most
likely tokens of both models. The label is the token after ``rows[row, column]`` in the text; at the end of a
row, ``rows`` does not have it."""
_KEYS = frozenset(("name", "tokens_sha256", "num_tokens", "means", "tokens_file_sha256"))


@dataclass(frozen=True)
class Evaluation:
    """One model on the tokens of a validation."""

    about: dict
    """What ``evaluation.json`` says: "name", "model", "tokens_sha256", "num_tokens", "means" and others."""
    tokens: dict[str, np.ndarray]
    """Arrays [tokens] by name, in the order of rows and columns: ``TOKEN_METRICS``, float32, ``INTEGERS``, int32."""
    rows: np.ndarray
    """The tokens that the model read, int32 [rows, sequence length]."""

    @property
    def name(self) -> str:
        return self.about["name"]


def means(tokens: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the mean of each metric over tokens, summed in float64."""
    return {name: float(tokens[name].mean(dtype=np.float64)) for name in TOKEN_METRICS}


def check_output(directory: Path) -> None:
    """Create the directory of a record, so that a long evaluation does not fail at its end.

    Raises:
        QADError: it cannot be written, or holds files of something else.
    """
    with naming(directory):
        directory.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in directory.iterdir() if path.name not in (RECORD_FILE, TOKENS_FILE))
        if others:
            raise QADError(f"--output {directory}: holds {others[0]}, which is not of an evaluation. Give a new one.")
        probe = directory / f"{TOKENS_FILE}.partial"
        new_files.open_new(probe).close()
        probe.unlink()


def save(evaluation: Evaluation, directory: Path) -> None:
    """Write a record; one of an earlier evaluation is replaced."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, rows=evaluation.rows, **evaluation.tokens)
    file, partial = directory / TOKENS_FILE, directory / f"{TOKENS_FILE}.partial"
    with naming(file):
        (directory / RECORD_FILE).unlink(missing_ok=True)  # it must not describe other tokens if this is interrupted
        with new_files.open_new(partial, "wb") as stream:
            stream.write(buffer.getbuffer())
        partial.replace(file)
    about = evaluation.about | {"tokens_file_sha256": manifest.sum_of(file)[1]}
    with naming(directory / RECORD_FILE):
        json_records.write(directory / RECORD_FILE, about)


def load(directory: str | Path) -> Evaluation:
    """Read a record.

    Raises:
        QADError: no record, or a damaged one.
    """
    directory = Path(directory)
    if not (directory / RECORD_FILE).is_file():
        raise QADError(f"{directory}: no {RECORD_FILE}. Give the --output of a complete megatron-qad evaluate.")
    about, file = json_records.read(directory / RECORD_FILE), directory / TOKENS_FILE
    if not isinstance(about, dict) or not _KEYS <= about.keys():
        raise QADError(f"{directory / RECORD_FILE}: is not a record of megatron-qad evaluate.")
    if not file.is_file() or manifest.sum_of(file)[1] != about["tokens_file_sha256"]:
        state = "has changed since it was written" if file.is_file() else "is missing"
        raise QADError(f"{file}: {state}. Evaluate {about['name']} again.")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            rows, tokens = arrays["rows"], {name: arrays[name] for name in (*TOKEN_METRICS, *INTEGERS)}
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise QADError(f"{file}: cannot be read: {error}. Evaluate {about['name']} again.") from error
    return Evaluation(about, tokens, rows)


def load_named(text: str) -> Evaluation:
    """Read a record given as RECORD or NAME=RECORD. Raises QADError as ``load`` does."""
    name, separator, directory = text.partition("=")
    if not separator or Path(text).is_dir():
        return load(text)
    evaluation = load(directory)
    return dataclasses.replace(evaluation, about=evaluation.about | {"name": name})
