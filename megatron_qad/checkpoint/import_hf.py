"""Import Hugging Face checkpoints to torch_dist with Megatron's global tensor names, readable at any TP, PP or EP size.

Needs no model and no GPU: the conversion follows the family's name map. Tensors stream: a process holds one at a time,
and reads it from the mapped source file. The checkpoint consists of parts, files of consecutive tensors, which worker
processes and torchrun's ranks share; an import that was killed continues after its finished parts. Values are copied
and at most cast to the requested dtype; FP8 weights with ``weight_scale_inv`` are dequantized to bfloat16.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_qad.checkpoint import finite, provenance, safetensors_file, source_names
from megatron_qad.checkpoint.hf_reader import ASSETS, PASSTHROUGH_FILE, HFReader
from megatron_qad.checkpoint.hf_writer import new_directory
from megatron_qad.checkpoint.model_directory import copy_files, find_files
from megatron_qad.checkpoint.release import lock_output, run_on_all_ranks
from megatron_qad.checkpoint.source_quantization import without_quantization
from megatron_qad.checkpoint.stream_import import PART_BYTES, stored_dtype, stored_parts, stream_import
from megatron_qad.engine.config_values import dtype_name
from megatron_qad.engine.distributed import rank_and_size
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import IMPORT_FILE
from megatron_qad.engine.text_files import read_json
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import ParamMapping

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_WEIGHT_DTYPES = ("F32", "BF16", "F16")
"""dtypes, as safetensors calls them, of the weights that are imported. Others would change a weight without a word."""


def import_hf(
    source: str | Path,
    target: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    num_workers: int | None = None,
    part_bytes: int = PART_BYTES,
) -> int:
    """Import ``source`` as the checkpoint ``target``: ``release/`` (torch_dist) and ``hf/`` (config and tokenizer).

    torch.distributed must be initialized; every rank calls this. Peak memory of a process, beyond what it has imported
    and the mapped source files: two times the largest tensor.

    Args:
        source: Hugging Face model directory.
        target: a new or empty directory.
        dtype: dtype of the stored weights.
        num_workers: worker processes of this rank. None: one for each core.
        part_bytes: a file of ``release/`` ends with the tensor that reaches this size. It is larger for models that
            would have more than 1024 files.

    Returns:
        The number of imported tensors.

    Raises:
        QADError: an unsupported family; missing, unexpected, truncated, wrong-shaped or non-finite tensors; a dtype
            other than float32, bfloat16 and float16; a quantized model, except FP8 with ``weight_scale_inv``; several
            sets of weights; a target that is not empty or is a mount point; a full disk. Nothing is left behind.

    Example::

        init_runtime()  # megatron_qad.engine: before Megatron is imported
        init_process_group()  # megatron_qad.engine.distributed
        num_tensors = import_hf("my_model", "checkpoints/teacher")
    """
    source, (rank, _) = Path(source), rank_and_size()
    with lock_output(target):
        target = run_on_all_ranks(lambda: new_directory(target))
        plan = run_on_all_ranks(lambda: ModelImport.of(source, dtype, with_passthrough=rank == 0))
        record = provenance.model_provenance(source, str(dtype).removeprefix("torch."))
        stream_import(
            target,
            plan.maps,
            dtype,
            convert=plan.convert,
            finish=lambda aside: plan.finish(aside, record),
            record=record,
            num_workers=num_workers,
            part_bytes=part_bytes,
        )
    return len(plan.maps)


@dataclass(frozen=True)
class ModelImport:
    """A model that is imported: its tensors by their checked names, shapes and dtypes. They are read by ``convert``."""

    reader: HFReader
    maps: Sequence[ParamMapping]
    passthrough: Sequence[str]
    """Names of the passthrough tensors; empty except on rank 0."""
    dtype: torch.dtype

    @classmethod
    def of(cls, source: Path, dtype: torch.dtype, with_passthrough: bool = True) -> "ModelImport":
        reader = HFReader(source)
        if with_passthrough:
            find_files(source, ASSETS)  # raises now instead of after gigabytes are written
        family = family_of(reader.config)
        family.megatron_args(reader.config)  # raises an error if training could not build the model
        dtype_name(reader.config)  # raises an error that an export would meet
        maps = family.tensors(reader.config)
        source_names.resolve(reader, maps)
        for tensor_map in maps:
            _check_source(reader, tensor_map)
        return cls(reader, maps, _passthrough_names(reader) if with_passthrough else (), dtype)

    def convert(self, tensor_map: ParamMapping) -> Iterator[tuple[str, torch.Tensor]]:
        """Read one tensor and yield the parts in which Megatron stores it, with their names."""
        return stored_parts(tensor_map, self._read(tensor_map))

    def write_passthrough(self, file: Path) -> None:
        """Write the passthrough tensors, one by one, after checking that they are finite."""

        def read(name: str) -> torch.Tensor:
            tensor = self.reader.read(name)
            finite.check_finite(tensor, f"{self.reader.directory}: {name}")
            return tensor

        specs = {name: (self.reader.read_dtype(name), self.reader.stored_shape(name)) for name in self.passthrough}
        safetensors_file.write_file(file, specs, ((name, read(name)) for name in self.passthrough))

    def _read(self, tensor_map: ParamMapping) -> torch.Tensor:
        parts = []
        for name in tensor_map.hf:
            where = f"{self.reader.directory}: {name}"
            advice = "Import with --dtype float32, or use another model."
            parts.append(finite.cast(self.reader.read(name), stored_dtype(tensor_map, self.dtype), where, advice))
        return tensor_map.to_megatron(parts).contiguous()

    def finish(self, aside: Path, record: dict) -> None:
        """Write the files next to the weights; called on the first rank."""
        copy_assets(self.reader.directory, aside / "hf")
        if names := self.passthrough:
            self.write_passthrough(aside / "hf" / PASSTHROUGH_FILE)
            print(
                f"megatron_qad: {len(names)} tensors ({names[0]}, ...) are passed through unchanged, not trained or "
                "quantized"
            )
        json_records.write(aside / IMPORT_FILE, record)


def _check_source(reader: HFReader, tensor_map: ParamMapping) -> None:
    """Check dtypes and shapes of a tensor's sources, from the headers of their files."""
    for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True):
        where, stored_dtype = f"{reader.directory}: {name}", reader.stored_dtype(name)
        if stored_dtype not in _WEIGHT_DTYPES and not reader.is_dequantized(name):
            raise QADError(
                f"{where} has dtype {stored_dtype}, expected {', '.join(_WEIGHT_DTYPES)}. Save the model in one of "
                "these."
            )
        if (stored_shape := reader.stored_shape(name)) != shape:
            raise QADError(f"{where} has shape {list(stored_shape)}, but config.json implies {list(shape)}.")


def copy_assets(source: Path, target: Path) -> None:
    """Copy the config, generation config and tokenizer files to the checkpoint's ``hf/``.

    The copied config describes what an export writes: the architecture with a head, and weights that are not quantized.
    """
    target.mkdir(parents=True, exist_ok=True)
    copy_files(source, target, ASSETS)
    config = read_json(target / "config.json")
    exported = {key: value for key, value in without_quantization(config).items() if key != "transformers_weights"}
    if (architecture := family_of(config).architecture) not in config.get("architectures", ()):
        exported["architectures"] = [architecture]
    if exported != config:
        (target / "config.json").write_text(json.dumps(exported, indent=2) + "\n", encoding="utf-8")
    if not any((target / name).is_file() for name in _TOKENIZER_FILES):
        print(
            f"megatron_qad: WARNING: {source} has no tokenizer ({', '.join(_TOKENIZER_FILES)}), so exports will have "
            "none, and servers need one. Copy its files to that directory and import again."
        )


def _passthrough_names(reader: HFReader) -> list[str]:
    """Return the names of the passthrough tensors, after checking that those implied by the config exist."""
    family, names = family_of(reader.config), source_names.passthrough_names(reader)
    implied = [name for tensor_map in family.passthrough_tensors(reader.config) for name in tensor_map.hf]
    for prefix in family.passthrough_prefixes:
        if any(name.startswith(prefix) for name in implied) and not any(name.startswith(prefix) for name in names):
            raise QADError(f"{reader.directory}: no tensor name starts with {prefix!r}. Download the model again.")
    return names
