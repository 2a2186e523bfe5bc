"""Read a Hugging Face model directory tensor by tensor; errors name the damaged file or tensor."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_qad.checkpoint.hf_writer import COPIED_FILES
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import read_json

PASSTHROUGH_FILE = "passthrough.safetensors"
"""File in a checkpoint's ``hf/`` with the tensors that are not part of the Megatron model."""
ASSETS = ("config.json", *COPIED_FILES)
"""File patterns that an import copies to ``hf/`` and an export copies to its output."""


class HFReader:
    """Reader of the tensors in a directory of safetensors files; a tensor is loaded when ``read`` is called.

    Raises:
        QADError: no config.json, no safetensors file, an index that lists a missing file, or a truncated file.

    Example::

        reader = HFReader("my_model")
        print(reader.config["architectures"], len(reader.names))
        weight = reader.read("model.embed_tokens.weight")  # Tensor [vocab, hidden], in the stored dtype
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        if not (self.directory / "config.json").is_file():
            raise QADError(f"{self.directory}: no config.json. Give a Hugging Face model directory.")
        self.config = read_json(self.directory / "config.json")
        self._open: dict[Path, object] = {}
        self._files = self._index()
        self._stored_names: dict[str, str] = {}

    def _index(self) -> dict[str, Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            if "weight_map" not in (content := read_json(index)):
                raise QADError(
                    f"{index}: no weight_map, expected the index that transformers writes. Download it again."
                )
            files = {name: self.directory / file for name, file in content["weight_map"].items()}
            for name, file in files.items():
                if not file.is_file():
                    raise QADError(f"{index}: {name} is listed in {file.name}, which is missing. Download it again.")
            return files
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            raise QADError(f"{self.directory}: no .safetensors file. Convert other formats with transformers first.")
        return {name: file for file in files for name in self._open_file(file).keys()}

    def _open_file(self, file: Path):
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise QADError(f"{file}: not a complete safetensors file ({error}). Download it again.") from error
        return self._open[file]

    def rename(self, aliases: Mapping[str, str]) -> None:
        """Rename tensors that are stored under an alias to the name in ``aliases``."""
        for alias, name in aliases.items():
            if alias in self._files and name not in self._files:
                self._files[name] = self._files.pop(alias)
                self._stored_names[name] = alias

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as stored. Raises QADError if there is none of that name or its file is truncated."""
        if name not in self._files:
            raise QADError(f"{self.directory}: no tensor {name!r}, which the architecture in config.json requires.")
        handle = self._open_file(self._files[name])
        try:
            return handle.get_tensor(self._stored_names.get(name, name))
        except SafetensorError as error:
            raise QADError(f"{self._files[name]}: cannot read {name}: {error}. Download it again.") from error


def declared_dtype(config: dict) -> torch.dtype | None:
    """Return ``dtype`` (in older files ``torch_dtype``) of a ``config.json``; None if it has neither."""
    name = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else None
