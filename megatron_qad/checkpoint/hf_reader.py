"""Reads a Hugging Face model directory tensor by tensor, and says what is wrong with it by name."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_qad.checkpoint.hf_writer import COPIED_FILES
from megatron_qad.engine.errors import QADError

PASSTHROUGH_FILE = "passthrough.safetensors"
"""Tensors that are no part of the Megatron model, beside the config in a checkpoint's ``hf/``."""
ASSETS = ("config.json", *COPIED_FILES)
"""What the imported checkpoint keeps beside the weights: all that export carries on."""


class HFReader:
    """Tensors of a directory of safetensors files, read when asked for.

    Raises:
        QADError: no config.json, no safetensors, an index that names a missing file, or a truncated file.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise QADError(f"{self.directory}: no config.json; expected a Hugging Face model directory")
        self.config = read_json(self.directory / "config.json")
        self._open: dict[Path, object] = {}
        self._file_of = self._index()
        self._stored_as: dict[str, str] = {}

    def _index(self) -> dict[str, Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            if "weight_map" not in (content := read_json(index)):
                raise QADError(f"{index}: no weight_map; expected the index that transformers writes")
            files = {name: self.directory / file for name, file in content["weight_map"].items()}
            for name, file in files.items():
                if not file.is_file():
                    raise QADError(f"{index}: {name} is said to be in {file.name}, which is missing; download it again")
            return files
        found = sorted(self.directory.glob("*.safetensors"))
        if not found:
            raise QADError(f"{self.directory}: no .safetensors file; convert other formats with transformers first")
        return {name: file for file in found for name in self._handle_of(file).keys()}

    def _handle_of(self, file: Path):
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise QADError(f"{file}: not a whole safetensors file ({error}); download it again") from error
        return self._open[file]

    def rename(self, aliases: Mapping[str, str]) -> None:
        """Give tensors that are stored under an alias the name that it stands for."""
        for alias, name in aliases.items():
            if alias in self._file_of and name not in self._file_of:
                self._file_of[name] = self._file_of.pop(alias)
                self._stored_as[name] = alias

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as stored. QADError if the directory has none of that name or its file is cut short."""
        if name not in self._file_of:
            raise QADError(f"{self.directory}: no tensor {name!r}, which the config's architecture needs")
        handle = self._handle_of(self._file_of[name])
        try:
            return handle.get_tensor(self._stored_as.get(name, name))
        except SafetensorError as error:
            raise QADError(f"{self._file_of[name]}: cannot read {name}: {error}") from error


def read_json(file: Path) -> dict:
    """A JSON object. QADError if the file is missing or holds something else."""
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise QADError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise QADError(f"{file}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise QADError(f"{file}: expected a JSON object, found a {type(content).__name__}")
    return content


def declared_dtype(config: dict) -> torch.dtype | None:
    """``dtype`` (or, in older files, ``torch_dtype``) of a ``config.json``; None if there is none."""
    name = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else None
