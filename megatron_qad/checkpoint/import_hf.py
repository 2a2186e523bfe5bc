"""Import Hugging Face checkpoints to torch_dist with Megatron's global tensor names, readable at any TP, PP or EP size.

Needs no model and no GPU: the conversion follows the family's name map. Under torchrun each rank imports a share of the
tensors and holds it in memory until it is saved, so a single process needs memory for the complete model. Values are
copied and at most cast to the requested dtype; FP8 weights with ``weight_scale_inv`` are dequantized to bfloat16.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_qad.checkpoint import finite, provenance, source_names
from megatron_qad.checkpoint.hf_reader import ASSETS, PASSTHROUGH_FILE, HFReader
from megatron_qad.checkpoint.hf_writer import new_directory
from megatron_qad.checkpoint.model_directory import copy_files, find_files
from megatron_qad.checkpoint.release import lock_output, run_on_all_ranks, write_release
from megatron_qad.checkpoint.source_quantization import without_quantization
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


def import_hf(source: str | Path, target: str | Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Import ``source`` as the checkpoint ``target``: ``release/`` (torch_dist) and ``hf/`` (config and tokenizer).

    torch.distributed must be initialized; every rank calls this.

    Args:
        source: Hugging Face model directory.
        target: a new or empty directory.
        dtype: dtype of the stored weights.

    Returns:
        The number of imported tensors.

    Raises:
        QADError: an unsupported family; missing, unexpected, truncated, wrong-shaped or non-finite tensors; a dtype
            other than float32, bfloat16 and float16; a quantized model, except FP8 with ``weight_scale_inv``; several
            sets of weights; a target that is not empty or is a mount point; a full disk.

    Example::

        init_runtime()  # megatron_qad.engine: before Megatron is imported
        init_process_group()  # megatron_qad.engine.distributed
        num_tensors = import_hf("my_model", "checkpoints/teacher")
    """
    source, rank, size = Path(source), *rank_and_size()
    with lock_output(target):
        target = run_on_all_ranks(lambda: new_directory(target))
        sharded, passthrough, count = run_on_all_ranks(lambda: _read(source, dtype, rank, size))
        write_release(target, sharded, lambda aside: _finish(source, aside, passthrough, dtype))
    return count


def _finish(source: Path, aside: Path, passthrough: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write the files next to the weights; called on the first rank."""
    copy_assets(source, aside / "hf")
    if passthrough:
        try:
            save_file(passthrough, aside / "hf" / PASSTHROUGH_FILE)
        except SafetensorError as error:  # the library wraps the operating system's error
            raise QADError(str(error)) from error
        first = next(iter(passthrough))
        print(
            f"megatron_qad: {len(passthrough)} tensors ({first}, ...) are passed through unchanged, not trained or "
            "quantized"
        )
    record = provenance.model_provenance(source, str(dtype).removeprefix("torch."))
    json_records.write(aside / IMPORT_FILE, record)


def _read(
    source: Path, dtype: torch.dtype, rank: int, size: int
) -> tuple[dict[str, ShardedTensor], dict[str, torch.Tensor], int]:
    """Read and convert this rank's share of the tensors.

    Returns:
        (converted tensors of this rank, passthrough tensors on rank 0, number of converted tensors over all ranks).
    """
    reader = HFReader(source)
    if rank == 0:
        find_files(source, ASSETS)  # raises now instead of after gigabytes are written
    family = family_of(reader.config)
    family.megatron_args(reader.config)  # raises an error if training could not build the model
    dtype_name(reader.config)  # raises an error that an export would meet
    maps = family.tensors(reader.config)
    source_names.resolve(reader, maps)
    passthrough = _read_passthrough(reader) if rank == 0 else {}
    local_maps = maps[rank::size]
    stored = {name: part for m in local_maps for name, part in stored_parts(m, _convert(reader, m, dtype))}
    return {name: ShardedTensor.from_rank_offsets(name, part) for name, part in stored.items()}, passthrough, len(maps)


def stored_parts(tensor_map: ParamMapping, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parts in which Megatron stores a tensor, with their names."""
    rows = tensor_map.checkpoint_splits
    for ending, part in zip(rows, tensor.split(tuple(rows.values())), strict=True):
        # Cloned, because Megatron clones views when it saves and would then hold both.
        yield tensor_map.megatron + ending, part if len(rows) == 1 else part.clone()


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


def _read_passthrough(reader: HFReader) -> dict[str, torch.Tensor]:
    """Read the passthrough tensors and check that they are finite and that those implied by the config exist."""
    family, names = family_of(reader.config), source_names.passthrough_names(reader)
    implied = [name for tensor_map in family.passthrough_tensors(reader.config) for name in tensor_map.hf]
    for prefix in family.passthrough_prefixes:
        if any(name.startswith(prefix) for name in implied) and not any(name.startswith(prefix) for name in names):
            raise QADError(f"{reader.directory}: no tensor name starts with {prefix!r}. Download the model again.")
    tensors = {name: reader.read(name).contiguous() for name in names}
    for name, tensor in tensors.items():
        finite.check_finite(tensor, f"{reader.directory}: {name}")
    return tensors


def _convert(reader: HFReader, tensor_map: ParamMapping, dtype: torch.dtype) -> torch.Tensor:
    parts = []
    for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True):
        where, stored_dtype = f"{reader.directory}: {name}", reader.stored_dtype(name)
        if stored_dtype not in _WEIGHT_DTYPES and not reader.is_dequantized(name):
            raise QADError(
                f"{where} has dtype {stored_dtype}, expected {', '.join(_WEIGHT_DTYPES)}. Save the model in one of "
                "these."
            )
        tensor = reader.read(name)
        if tuple(tensor.shape) != shape:
            raise QADError(f"{where} has shape {list(tensor.shape)}, but config.json implies {list(shape)}.")
        target = torch.float32 if tensor_map.is_float32 else dtype
        parts.append(finite.cast(tensor, target, where, "Import with --dtype float32, or use another model."))
    return tensor_map.to_megatron(parts).contiguous()
