"""Checks of a local Hugging Face directory before transformers opens it, so that nothing is loaded from elsewhere.

transformers follows some entries of ``config.json`` to code on the Hub: the name of a repository as implementation of
attention or experts, and flash attention where the package is missing. ``auto_map`` is refused by transformers itself.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "model.safetensors.index.json"),
)
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_PER_LAYER = "per_layer_config"


def check_json_files(directory: str | Path) -> None:
    """Raise a ``QADError`` if a JSON file that transformers reads is damaged or nested too deeply."""
    for name in _JSON_FILES:
        if (file := Path(directory) / name).is_file():
            read_json(file)


def missing_config(path: str | Path, advice: str) -> str:
    """Return the message for a model directory without ``config.json``: what the path is instead, then ``advice``."""
    path = Path(path)
    if path.is_file():
        found = " The path is a file."
    elif not path.exists():
        found = " The path does not exist; names on the Hub are not downloaded."
    elif (path / "hf" / "config.json").is_file():
        found = f" The directory is a Megatron checkpoint; config and tokenizer of its model are in {path / 'hf'}."
    else:
        found = ""
    return f"{path}: no config.json. {advice}{found}"


def local_config(directory: str | Path) -> "PretrainedConfig":
    """Return the config of a model directory, with the implementations that transformers itself chooses.

    Raises:
        QADError: a damaged JSON file, no config.json, an implementation from a repository on the Hub, or a model that
            needs code of its own.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise QADError(missing_config(directory, "Give a Hugging Face directory with model and tokenizer."))
    check_json_files(directory)
    content = read_json(directory / "config.json")
    for path, value in _implementations(content):
        if not isinstance(value, str | None) or "/" in str(value) or value is not None and path.startswith(_PER_LAYER):
            raise QADError(
                f"{directory / 'config.json'}: {path} is {value!r:.100}, which would load code from outside the "
                "directory. Remove the entry."
            )
    # Layers of Mamba would fetch compiled kernels from the Hub, if the package `kernels` is installed.
    os.environ["USE_HUB_KERNELS"] = "NO"
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        if "auto_map" in content:
            raise QADError(
                f"{directory / 'config.json'}: model_type {content.get('model_type')!r:.100} needs the code of its "
                "auto_map, which is never run. Give a model that transformers knows."
            ) from error
        raise
    # Many files name flash_attention_2; transformers fetches a kernel where the package is missing.
    config._attn_implementation = config._experts_implementation = None
    return config


def _implementations(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of every entry, at any depth, that names an implementation."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _implementations(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            name = f"{path}.{key}" if path else str(key)
            if str(key).strip("_").removesuffix("_internal") in _IMPLEMENTATIONS:
                for part in item.values() if isinstance(item, dict) else [item]:
                    yield name, part
            else:
                yield from _implementations(item, name)
