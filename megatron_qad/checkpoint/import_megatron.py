"""Import checkpoints that Megatron-LM or Megatron-Bridge saved: ``GPTModel``, ``HybridModel`` and ``MambaModel``.

The source is a torch_dist checkpoint with names and layers of its own (``megatron_names``). The result is the directory
that ``import_hf`` writes for the same model. Needs no model and no GPU. Under torchrun each rank imports a share of the
tensors and holds it in memory until it is saved. Values are copied and at most cast to the requested dtype.
"""

import re
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_qad.checkpoint import finite, provenance
from megatron_qad.checkpoint.hf_reader import ASSETS
from megatron_qad.checkpoint.hf_writer import new_directory
from megatron_qad.checkpoint.import_hf import copy_assets, stored_parts
from megatron_qad.checkpoint.megatron_names import Piece, is_gpt, locate
from megatron_qad.checkpoint.megatron_settings import check_settings, read_settings
from megatron_qad.checkpoint.model_directory import find_files
from megatron_qad.checkpoint.release import lock_output, run_on_all_ranks, write_release
from megatron_qad.checkpoint.slice_reader import SliceReader, Stored
from megatron_qad.engine.distributed import rank_and_size
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.local_models import missing_config
from megatron_qad.engine.plural import count
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.run_directory.iterations import iteration_dir, saved_iterations
from megatron_qad.engine.run_directory.run_files import IMPORT_FILE, TRACKER
from megatron_qad.engine.text_files import read_json
from megatron_qad.models.families import family_of
from megatron_qad.models.families.base import ParamMapping

_NOT_WEIGHTS = re.compile(r"(chained_\d+\.)?optimizer\.|.*_extra_state|rng_state|rerun_state_machine_state")
_MTP = "mtp."


def import_megatron(
    source: str | Path, hf_config: str | Path, target: str | Path, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Import ``source`` as the checkpoint ``target``: ``release/`` (torch_dist) and ``hf/`` (config and tokenizer).

    torch.distributed must be initialized; every rank calls this.

    Args:
        source: a checkpoint directory of Megatron, of which the newest iteration is imported, or the directory of one
            iteration.
        hf_config: Hugging Face directory with ``config.json`` and tokenizer of the model, or the path of its
            ``config.json``. Weights there are not read.
        target: a new or empty directory.
        dtype: dtype of the stored weights.

    Returns:
        The number of imported tensors.

    Raises:
        QADError: another checkpoint format; an unsupported family; settings that contradict the config; missing,
            unexpected, wrong-shaped, quantized or non-finite tensors; a target that is not empty; a full disk.

    Example::

        init_runtime()  # megatron_qad.engine: before Megatron is imported
        init_process_group()  # megatron_qad.engine.distributed
        num_tensors = import_megatron("runs/gpt", "my_model", "checkpoints/teacher")
    """
    assets = assets_of(hf_config)
    with lock_output(target):
        target = run_on_all_ranks(lambda: new_directory(target))
        directory = run_on_all_ranks(lambda: iteration_to_import(source))
        sharded, num_tensors = run_on_all_ranks(lambda: _read(directory, assets, dtype))
        write_release(target, sharded, lambda aside: _finish(directory, assets, aside, dtype))
    return num_tensors


def assets_of(hf_config: str | Path) -> Path:
    """Return the Hugging Face directory for a directory or its ``config.json``."""
    path = Path(hf_config)
    directory = path.parent if path.name == "config.json" else path
    if not (directory / "config.json").is_file():
        raise QADError(missing_config(path, "Give the Hugging Face directory with config and tokenizer of the model."))
    return directory


def iteration_to_import(source: str | Path) -> Path:
    """Return the directory of the iteration to import, after checking that it is a torch_dist checkpoint.

    Raises:
        QADError: no such directory; no iteration; a checkpoint of this project; another checkpoint format.
    """
    source = Path(source)
    if not source.is_dir():
        raise QADError(f"{source}: no such directory. Give a checkpoint directory of Megatron.")
    if (source / "hf" / "config.json").is_file():
        raise QADError(f"{source}: already has hf/config.json. Use it as it is, without an import.")
    if (source / "metadata.json").is_file() or (source / ".metadata").is_file():
        directory = source
    elif (source / TRACKER).is_file():
        directory = _tracked(source)
    else:
        found = saved_iterations(source)
        if len(found) != 1:
            names = ", ".join(path.name for path in reversed(found)) or "no iteration"
            raise QADError(
                f"{source}: no {TRACKER}, which would name the iteration to import. The directory has {names}. Give "
                "the directory of a checkpoint, or of one of its iterations."
            )
        directory = found[0]
    if _format(directory) != "torch_dist" or not (directory / ".metadata").is_file():
        raise QADError(
            f"{directory}: not a complete torch_dist checkpoint (format: {_format(directory)}). Convert other formats "
            "with Megatron-LM (--ckpt-convert-format torch_dist --ckpt-convert-save DIR)."
        )
    return directory


def _tracked(source: Path) -> Path:
    """Return the iteration that the tracker names; the newest one in Megatron's old format, which is refused later."""
    try:
        return iteration_dir(source)
    except QADError:
        if legacy := [path for path in saved_iterations(source) if any(path.glob("mp_rank_*"))]:
            return legacy[0]
        raise


def _format(directory: Path) -> str:
    if (file := directory / "metadata.json").is_file():
        return str(read_json(file).get("sharded_backend"))
    return "torch" if any(directory.glob("mp_rank_*")) else "unknown"


def _read(directory: Path, assets: Path, dtype: torch.dtype) -> tuple[dict[str, ShardedTensor], int]:
    """Return this rank's share of the converted tensors, and the number of tensors over all ranks."""
    config, (rank, size) = read_json(assets / "config.json"), rank_and_size()
    if rank == 0:
        find_files(assets, ASSETS)  # raises now instead of after gigabytes are written
    family = family_of(config)
    family.megatron_args(config)  # raises an error if training could not build the model
    if family.passthrough_tensors(config):
        raise QADError(
            f"{assets / 'config.json'}: {family.architecture} has tensors outside the language model, which this "
            "import cannot read. Import the Hugging Face model (tools/import_hf.py)."
        )
    maps, reader = family.tensors(config), SliceReader(directory)
    stored = _weights(reader, verbose=rank == 0)
    settings, text = read_settings(directory)
    check_settings(settings, text, config, gpt=is_gpt(stored, directory))
    if not settings and rank == 0:
        print(
            f"megatron_qad: WARNING: {text} Settings that tensors do not show (rotary base, norm epsilon, number of "
            "heads, router) are taken from config.json."
        )
    pieces = locate(maps, stored, directory)
    parts = {}
    for tensor_map, tensor in _tensors(reader, maps[rank::size], pieces, dtype):
        parts |= dict(stored_parts(tensor_map, tensor.contiguous()))
    return {name: ShardedTensor.from_rank_offsets(name, part) for name, part in parts.items()}, len(maps)


def _weights(reader: SliceReader, verbose: bool) -> dict[str, Stored]:
    """Return the tensors of the model, without optimizer state and multi-token prediction layers."""
    stored = {name: tensor for name, tensor in reader.stored.items() if not _NOT_WEIGHTS.match(name)}
    left_out = sorted(name for name in stored if name.startswith(_MTP))
    if left_out and verbose:
        print(
            f"megatron_qad: {count(len(left_out), 'tensor')} of multi-token prediction layers ({left_out[0]}, ...) "
            "left out. Exports of this checkpoint have none."
        )
    return {name: tensor for name, tensor in stored.items() if not name.startswith(_MTP)}


def _tensors(
    reader: SliceReader, maps: list[ParamMapping], pieces: dict[str, tuple[Piece, ...]], dtype: torch.dtype
) -> Iterator[tuple[ParamMapping, torch.Tensor]]:
    """Yield the tensors of ``maps`` in the new dtype, read layer by layer, without vocabulary padding."""
    for _, group in groupby(maps, key=lambda m: m.layer):
        group = list(group)
        wanted = [piece for m in group for piece in pieces[m.megatron]]
        read = iter(zip(wanted, reader.read([piece.slice for piece in wanted]), strict=True))
        for m in group:
            parts = []
            for piece, part in islice(read, len(pieces[m.megatron])):
                where = f"{reader.directory}: {piece.name}{list(piece.index) or ''}"
                target = torch.float32 if m.is_float32 else dtype
                part = finite.cast(part.reshape(piece.shape), target, where, "Import with --dtype float32.")
                parts.append(part)
            yield m, torch.cat(parts)[: m.shape[0]]


def _finish(directory: Path, assets: Path, aside: Path, dtype: torch.dtype) -> None:
    """Write the files next to the weights; called on the first rank."""
    copy_assets(assets, aside / "hf")
    json_records.write(aside / IMPORT_FILE, import_provenance(directory, assets, dtype))


def import_provenance(directory: Path, assets: Path, dtype: torch.dtype) -> dict:
    """Return the provenance record of an import of the iteration ``directory``."""
    return provenance.megatron_provenance(directory, assets, str(dtype).removeprefix("torch."))
