"""Import Hugging Face checkpoints to torch_dist with Megatron's global tensor names, readable at any TP, PP or EP size.

Needs no model and no GPU: the conversion follows the family's name map. Under torchrun each rank imports a share of the
tensors and holds it in memory until it is saved, so a single process needs memory for the complete model. Values are
copied and at most cast to the requested dtype.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_qad.checkpoint import provenance
from megatron_qad.checkpoint.hf_reader import ASSETS, PASSTHROUGH_FILE, HFReader
from megatron_qad.checkpoint.hf_writer import new_directory
from megatron_qad.checkpoint.release import lock_output, run_on_all_ranks, write_release
from megatron_qad.engine.distributed import rank_and_size
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.run_files import IMPORT_FILE
from megatron_qad.models.families import family_of, text_config
from megatron_qad.models.families.base import ParamMapping


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
        QADError: an unsupported family; missing, unexpected, truncated, wrong-shaped or non-finite tensors; a target
            that is not empty or is a mount point; a full disk.

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
    family = family_of(reader.config)
    reader.rename(family.aliases)
    family.megatron_args(reader.config)  # raises an error if training could not build the model
    maps = family.tensors(reader.config)
    _check_names(reader, maps)
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
    """Copy the config, generation config and tokenizer files to the checkpoint's ``hf/``."""
    target.mkdir(parents=True, exist_ok=True)
    for path in {path for pattern in ASSETS for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def passthrough_names(reader: HFReader) -> list[str]:
    """Return the names of the tensors that are passed through from import to export unchanged."""
    prefixes = family_of(reader.config).passthrough_prefixes
    return sorted(name for name in reader.names if name.startswith(prefixes))


def _check_names(reader: HFReader, maps: list[ParamMapping]) -> None:
    expected = {name for m in maps for name in m.hf}
    unexpected = reader.names - expected - set(passthrough_names(reader))
    if text_config(reader.config).get("tie_word_embeddings"):
        unexpected.discard("lm_head.weight")  # some files store the tied head a second time
    unexpected = {name for name in unexpected if not name.endswith("rotary_emb.inv_freq")}  # computed, not learned
    if unexpected:
        raise QADError(
            f"{reader.directory}: {len(unexpected)} tensors are not part of the model, first {sorted(unexpected)[0]!r}."
        )
    if missing := expected - reader.names:
        raise QADError(f"{reader.directory}: {len(missing)} tensors are missing, first {sorted(missing)[0]!r}.")


def _read_passthrough(reader: HFReader) -> dict[str, torch.Tensor]:
    """Read the passthrough tensors and check that they are finite and that those implied by the config exist."""
    family, names = family_of(reader.config), passthrough_names(reader)
    implied = [name for tensor_map in family.passthrough_tensors(reader.config) for name in tensor_map.hf]
    for prefix in family.passthrough_prefixes:
        if any(name.startswith(prefix) for name in implied) and not any(name.startswith(prefix) for name in names):
            raise QADError(f"{reader.directory}: no tensor name starts with {prefix!r}. Download the model again.")
    return {name: _read_finite(reader, name).contiguous() for name in names}


def _read_finite(reader: HFReader, name: str) -> torch.Tensor:
    tensor = reader.read(name)
    if not bool(torch.isfinite(tensor).all()):
        raise QADError(f"{reader.directory}: {name} has NaN or Inf values.")
    return tensor


def _convert(reader: HFReader, tensor_map: ParamMapping, dtype: torch.dtype) -> torch.Tensor:
    parts = []
    for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True):
        tensor = _read_finite(reader, name)
        if tuple(tensor.shape) != shape:
            raise QADError(
                f"{reader.directory}: {name} has shape {list(tensor.shape)}, but config.json implies {list(shape)}."
            )
        parts.append(tensor.to(torch.float32 if tensor_map.is_float32 else dtype))
    return tensor_map.to_megatron(parts).contiguous()
