"""Read a Hugging Face model directory tensor by tensor; errors name the damaged file or tensor."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError

from megatron_qad.checkpoint import source_quantization, weight_files
from megatron_qad.checkpoint.hf_writer import COPIED_FILES
from megatron_qad.checkpoint.model_directory import check_file
from megatron_qad.engine.config_values import dtype_name
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.local_models import missing_config
from megatron_qad.engine.text_files import read_json

PASSTHROUGH_FILE = "passthrough.safetensors"
"""File in a checkpoint's ``hf/`` with the tensors that are not part of the Megatron model."""
ASSETS = ("config.json", *COPIED_FILES)
"""File patterns that an import copies to ``hf/`` and an export copies to its output."""


class HFReader:
    """Reader of the tensors in a directory of safetensors files; a tensor is loaded when ``read`` is called.

    FP8 weights with ``weight_scale_inv`` are dequantized to bfloat16 when they are read.

    Raises:
        QADError: no config.json, no safetensors file, several sets of weights, files outside the directory, an index
            that does not match the files, a truncated file, or a quantized model of another kind.

    Example::

        reader = HFReader("my_model")
        print(reader.config["architectures"], len(reader.names))
        weight = reader.read("model.embed_tokens.weight")  # Tensor [vocab, hidden], in the stored dtype
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.config = self._read_config()
        self._open = {
            file: weight_files.open_weights(file) for file in weight_files.weight_files(self.directory, self.config)
        }
        self._stored_names: dict[str, str] = {}
        self._files = self._find_tensors()
        self.fp8 = source_quantization.find_quantization(
            self.directory, self.config, {name: self.stored_dtype(name) for name in self._files}
        )
        if self.fp8 is not None:
            self._scale_files = {name: self._files.pop(name) for name in self.fp8.scales}

    def _read_config(self) -> dict:
        file = self.directory / "config.json"
        if (snapshots := self.directory / "snapshots").is_dir() and not file.exists():
            raise QADError(f"{self.directory}: is a cache of Hugging Face. Give a directory in {snapshots}.")
        if not file.exists() and not file.is_symlink():
            raise QADError(missing_config(self.directory, "Give a Hugging Face model directory."))
        return read_json(check_file(self.directory, file))

    def _find_tensors(self) -> dict[str, Path]:
        """Return the file of every tensor. A tensor that is in two files must be the same in both."""
        found: dict[str, list[Path]] = {}
        for file, handle in self._open.items():
            for name in handle.keys():
                found.setdefault(name, []).append(file)
        weight_files.check_index(self.directory, found)
        for name, (first, *others) in found.items():
            for other in others:
                if not _same(self._load(first, name), self._load(other, name)):
                    raise QADError(
                        f"{self.directory}: {name} is in {first.name} and in {other.name} with different values, and "
                        "loaders disagree which one they use. Remove the file that does not belong to the model."
                    )
        return {name: files[0] for name, files in found.items()}

    def rename(
        self, aliases: Mapping[str, str], if_different: str = "these are names of one tensor. Remove the wrong one"
    ) -> None:
        """Rename tensors that are stored under an alias to the name in ``aliases``.

        Args:
            if_different: the end of the error for two tensors that differ.

        Raises:
            QADError: a tensor is stored under both names, with different values.
        """
        for alias, name in aliases.items():
            if alias not in self._files or alias == name:
                continue
            if name in self._files:
                if not _same(self.read(alias), self.read(name)):
                    raise QADError(f"{self.directory}: {alias} and {name} have different values, but {if_different}.")
                del self._files[alias]
            else:
                self._files[name] = self._files.pop(alias)
                self._stored_names[name] = self._stored_names.pop(alias, alias)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def stored_dtype(self, name: str) -> str:
        """Return the dtype of a tensor in its file, as safetensors calls it: "BF16", "F8_E4M3", "I64", ..."""
        return self._slice(name).get_dtype()

    def read_dtype(self, name: str) -> str:
        """Return the dtype in which ``read`` returns the tensor."""
        return "BF16" if self.is_dequantized(name) else self.stored_dtype(name)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str):
        return self._open[self._files[name]].get_slice(self._stored_names.get(name, name))

    def is_dequantized(self, name: str) -> bool:
        """Return whether ``read`` dequantizes the tensor."""
        return self.fp8 is not None and self._stored_names.get(name, name) in self.fp8.weights

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor as stored. Raises QADError if there is none of that name or its file is truncated."""
        if name not in self._files:
            raise QADError(f"{self.directory}: no tensor {name!r}, which the architecture in config.json requires.")
        stored_name = self._stored_names.get(name, name)
        tensor = self._load(self._files[name], stored_name)
        if not self.is_dequantized(name):
            return tensor
        scale_name = stored_name + source_quantization.SCALE
        return self.fp8.dequantize(tensor, self._load(self._scale_files[scale_name], scale_name), stored_name)

    def _load(self, file: Path, name: str) -> torch.Tensor:
        try:
            return self._open[file].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:  # RuntimeError: a dtype that torch does not have
            raise QADError(f"{file}: cannot read {name}: {error}. Download it again.") from error


def declared_dtype(config: dict) -> torch.dtype | None:
    """Return ``dtype`` (in older files ``torch_dtype``) of a ``config.json``; None if it has neither.

    Raises:
        QADError: a dtype in which weights are not stored, or both keys with different values.
    """
    name = dtype_name(config)
    return None if name is None else getattr(torch, name)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype == second.dtype and first.dtype.itemsize > 1:
        return torch.equal(first, second)
    return first.shape == second.shape and torch.equal(first.float(), second.float())
