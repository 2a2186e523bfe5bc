"""Hugging Face -> torch_dist: the weights under Megatron's global names, which any TP, PP or EP reads.

Needs no model and no GPU: the family's name map says what to do. Under torchrun each rank imports its share, which it
holds in memory until it is saved: one process needs room for the whole model. Values are copied, never changed but for
a cast to the asked dtype.
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
    """Write ``target`` (``release/`` in torch_dist format, ``hf/`` with config and tokenizer); return its number of
    tensors.

    torch.distributed must be initialized; every rank calls this.

    Raises:
        QADError: unsupported family, missing, left-over, truncated, wrong-shaped or non-finite tensors, or a target
            that exists and is not empty or is a mount point, a full disk.
    """
    source, rank, size = Path(source), *rank_and_size()
    with lock_output(target):
        target = run_on_all_ranks(lambda: new_directory(target))
        sharded, passthrough, count = run_on_all_ranks(lambda: _read(source, dtype, rank, size))
        write_release(target, sharded, lambda aside: _finish(source, aside, passthrough, dtype))
    return count


def _finish(source: Path, aside: Path, passthrough: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """The first rank: what stands beside the weights."""
    copy_assets(source, aside / "hf")
    if passthrough:
        try:
            save_file(passthrough, aside / "hf" / PASSTHROUGH_FILE)
        except SafetensorError as error:  # the library wraps the operating system's error
            raise QADError(str(error)) from error
        first = next(iter(passthrough))
        print(f"megatron_qad: {len(passthrough)} tensors ({first}, ...) are carried along: not trained, not quantized")
    record = provenance.model_provenance(source, str(dtype).removeprefix("torch."))
    json_records.write(aside / IMPORT_FILE, record)


def _read(
    source: Path, dtype: torch.dtype, rank: int, size: int
) -> tuple[dict[str, ShardedTensor], dict[str, torch.Tensor], int]:
    """This rank's share of the tensors, converted, what rank 0 carries along, and the number of all that are converted.
    Writes nothing."""
    reader = HFReader(source)
    family = family_of(reader.config)
    reader.rename(family.aliases)
    family.megatron_args(reader.config)  # refuses now what training could not build
    maps = family.tensors(reader.config)
    _check_names(reader, maps)
    passthrough = _read_passthrough(reader) if rank == 0 else {}
    mine = maps[rank::size]
    stored = {name: part for m in mine for name, part in _stored(m, _convert(reader, m, dtype))}
    return {name: ShardedTensor.from_rank_offsets(name, part) for name, part in stored.items()}, passthrough, len(maps)


def _stored(tensor_map: ParamMapping, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    rows = tensor_map.checkpoint_splits
    for ending, part in zip(rows, tensor.split(tuple(rows.values())), strict=True):
        # Megatron clones views when it saves, beside the tensor that they are of.
        yield tensor_map.megatron + ending, part if len(rows) == 1 else part.clone()


def copy_assets(source: Path, target: Path) -> None:
    """Config, generation config and tokenizer files, so that the checkpoint describes itself."""
    target.mkdir(parents=True, exist_ok=True)
    for path in {path for pattern in ASSETS for path in source.glob(pattern)}:
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def passthrough_names(reader: HFReader) -> list[str]:
    """Tensors that the family carries from import to export as they are."""
    prefixes = family_of(reader.config).passthrough_prefixes
    return sorted(name for name in reader.names if name.startswith(prefixes))


def _check_names(reader: HFReader, maps: list[ParamMapping]) -> None:
    wanted = {name for m in maps for name in m.hf}
    left_over = reader.names - wanted - set(passthrough_names(reader))
    if text_config(reader.config).get("tie_word_embeddings"):
        left_over.discard("lm_head.weight")  # some files store the tied head a second time
    left_over = {name for name in left_over if not name.endswith("rotary_emb.inv_freq")}  # computed, not learned
    if left_over:
        raise QADError(
            f"{reader.directory}: {len(left_over)} tensors have no place in the model, first {sorted(left_over)[0]!r}"
        )
    if missing := wanted - reader.names:
        raise QADError(f"{reader.directory}: {len(missing)} tensors are missing, first {sorted(missing)[0]!r}")


def _read_passthrough(reader: HFReader) -> dict[str, torch.Tensor]:
    """What the family carries along: none of what the config tells of missing as a whole, and all of it finite."""
    family, names = family_of(reader.config), passthrough_names(reader)
    told = [name for tensor_map in family.passthrough_tensors(reader.config) for name in tensor_map.hf]
    for prefix in family.passthrough_prefixes:
        if any(name.startswith(prefix) for name in told) and not any(name.startswith(prefix) for name in names):
            raise QADError(f"{reader.directory}: no tensor's name begins with {prefix!r}; download it again")
    return {name: _read_finite(reader, name).contiguous() for name in names}


def _read_finite(reader: HFReader, name: str) -> torch.Tensor:
    tensor = reader.read(name)
    if not bool(torch.isfinite(tensor).all()):
        raise QADError(f"{reader.directory}: {name} holds NaN or Inf")
    return tensor


def _convert(reader: HFReader, tensor_map: ParamMapping, dtype: torch.dtype) -> torch.Tensor:
    parts = []
    for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True):
        tensor = _read_finite(reader, name)
        if tuple(tensor.shape) != shape:
            raise QADError(
                f"{reader.directory}: {name} has shape {list(tensor.shape)}, config.json implies {list(shape)}"
            )
        parts.append(tensor.to(torch.float32 if tensor_map.is_float32 else dtype))
    return tensor_map.to_megatron(parts).contiguous()
