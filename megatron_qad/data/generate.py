"""Generation of training text: a JSONL file with one document per line, which a killed and restarted run completes.

The documents come from a source: a model in this process (``local_generation``), an OpenAI-compatible server
(``server_generation``), or random tokens (``random_tokens``). Document n has its own seed, so a restarted run leaves no
gap and repeats nothing.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import locks, manifest
from megatron_qad.engine.system_errors import naming
from megatron_qad.engine.text_files import read_json


@dataclass(frozen=True)
class GenerateOptions:
    """Sampling options. A resumed run must use the same values, except for ``num_documents``."""

    num_documents: int
    """Number of lines of the finished file. If it exceeds the number of prompts, they are reused with new samples."""
    max_new_tokens: int = 512
    """Maximum length of a document or an answer, in tokens."""
    batch_size: int = 16
    """Number of documents sampled at a time. In this process the output of a seed depends on it."""
    temperature: float = 1.0
    """Sampling temperature, above 0; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Probability mass of the most likely tokens to sample from (top-p); 1 disables the limit."""
    seed: int = 1234
    """Random seed: of batch b seed + b in this process, of document n seed + n on a server."""
    dtype: str = "bfloat16"
    """dtype of a model in this process: "bfloat16" or "float32"."""

    def __post_init__(self) -> None:
        if min(self.num_documents, self.max_new_tokens, self.batch_size) < 1:
            raise QADError(f"num_documents, max_new_tokens and batch_size must be at least 1, found {self}.")
        if not (math.isfinite(self.temperature) and self.temperature > 0 and 0 < self.top_p <= 1):
            raise QADError(f"temperature must be above 0 and top_p in (0, 1], found {self.temperature}, {self.top_p}.")
        if self.dtype not in ("bfloat16", "float32"):
            raise QADError(f"dtype {self.dtype!r} is not 'bfloat16' or 'float32'.")


class Source(Protocol):
    """Where documents come from."""

    batch_size: int
    """Documents n * batch_size to (n + 1) * batch_size - 1 depend on each other and are generated together."""

    def settings(self) -> dict[str, Any]:
        """Return, as JSON, what determines the documents: the model, prompts and sampling."""

    def documents(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        """Yield the lines of documents ``first`` to ``end - 1`` in order; ``first`` is a multiple of ``batch_size``."""


def write_documents(source: Source, output: str | Path, num_documents: int) -> int:
    """Write documents into a JSONL file that ``megatron-qad prepare`` reads. A second call resumes it.

    Args:
        output: JSONL file. The source's settings are recorded next to it in OUTPUT.settings.json.
        num_documents: number of lines of the finished file.

    Returns:
        Number of lines written by this call.

    Raises:
        QADError: the output was started with other settings, for example with other weights at the same path, or the
            source failed.

    Example::

        source = LocalModel("my_model", ["What is a class?"], GenerateOptions(num_documents=4))
        write_documents(source, "answers.jsonl", 4)  # 4
        write_documents(source, "answers.jsonl", 4)  # 0: the file is complete
    """
    output = Path(output)
    with locks.lock_output(output):
        done = _resume(output, source, num_documents)
        if done >= num_documents:
            return 0
        with (
            naming(output),
            output.open("a", encoding="utf-8") as stream,
            tqdm(total=num_documents, initial=done, unit="doc", desc="generating", disable=None) as bar,
        ):
            for line in source.documents(done, num_documents):
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                stream.flush()
                bar.update()
        return num_documents - done


def _resume(output: Path, source: Source, num_documents: int) -> int:
    """Truncate the output to complete batches and return its number of lines; write the settings if it is new."""
    settings_path = Path(f"{output}.settings.json")
    settings = json.loads(json.dumps(source.settings()))
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_atomically(settings_path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return 0
    if not settings_path.is_file():
        raise QADError(f"{output} exists without {settings_path.name}, so it cannot be resumed. Choose another file.")
    recorded = read_json(settings_path, "Choose another output file.")
    differing = _differences(settings, recorded)
    if differing:
        raise QADError(
            f"{output} was started with other settings: {', '.join(differing)} differ from {settings_path.name}. Give "
            "the same settings to resume it, or choose another file."
        )
    lines = output.read_bytes().split(b"\n")[:-1]  # a line after the last newline is incomplete
    complete = len(lines) - len(lines) % source.batch_size if len(lines) < num_documents else len(lines)
    with output.open("r+b") as stream:
        stream.truncate(sum(len(line) + 1 for line in lines[:complete]))
    return complete


def _differences(settings: dict, recorded: dict) -> list[str]:
    """Return the names of settings that differ; of sums of files also the names of the files."""
    names = []
    for key in sorted(settings.keys() | recorded.keys()):
        values = settings.get(key), recorded.get(key)
        if all(isinstance(value, dict) for value in values):
            files = sorted(
                name for name in values[0].keys() | values[1].keys() if values[0].get(name) != values[1].get(name)
            )
            names += [f"{key} ({', '.join(files)})"] if files else []
        elif values[0] != values[1]:
            names.append(key)
    return names
