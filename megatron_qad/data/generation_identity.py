"""What identifies the model and the prompts of generated data, so that a resumed run does not mix two of them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_qad.data.prompts import Prompt
from megatron_qad.data.tokenizer import files_sha256
from megatron_qad.engine.system_errors import naming

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


def model_files(directory: str | Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a Hugging Face model: weights, configs, tokenizer, chat template.

    Reads all weights, at about 2 GB/s with SHA instructions, so that other weights at the same path are noticed.
    """
    with naming(directory):
        return files_sha256(file for file in sorted(Path(directory).iterdir()) if file.suffix in _SUFFIXES)


def prompts_digest(prompts: Sequence[Prompt] | None) -> str | None:
    """Return the number and the SHA-256 of the prompts; None without prompts."""
    if prompts is None:
        return None
    text = json.dumps([asdict(prompt) for prompt in prompts])
    return f"{len(prompts)} prompts, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
