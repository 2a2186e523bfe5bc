"""Import checkpoints that Megatron-LM or Megatron-Bridge saved: ``GPTModel``, ``HybridModel`` and ``MambaModel``.

The source is a torch_dist checkpoint with names and layers of its own (``megatron_names``). The result is the directory
that ``import_hf`` writes for the same model. Needs no model and no GPU. Tensors stream as in ``import_hf``: worker
processes and torchrun's ranks share the files, and an import that was killed continues after its finished ones. Values
are copied and at most cast to the requested dtype.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_qad.checkpoint import finite, provenance
from megatron_qad.checkpoint.hf_reader import ASSETS
from megatron_qad.checkpoint.hf_writer import new_directory
from megatron_qad.checkpoint.import_hf import copy_assets
from megatron_qad.checkpoint.megatron_names import Piece, is_gpt, locate
from megatron_qad.checkpoint.megatron_settings import check_settings, read_settings
from megatron_qad.checkpoint.model_directory import find_files
from megatron_qad.checkpoint.release import lock_output, run_on_all_ranks
from megatron_qad.checkpoint.slice_reader import SliceReader, Stored
from megatron_qad.checkpoint.stream_import import PART_BYTES, stored_dtype, stored_parts, stream_import
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
    source: str | Path,
    hf_config: str | Path,
    target: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    num_workers: int | None = None,
    part_bytes: int = PART_BYTES,
) -> int:
    """Import ``source`` as the checkpoint ``target``: ``release/`` (torch_dist) and ``hf/`` (config and tokenizer).

    torch.distributed must be initialized; every rank calls this. Peak memory of a process, beyond what it has imported:
    two times the largest tensor, or the part of the source's files that holds it, if that is larger.

    Args:
        source: a checkpoint directory of Megatron, of which the newest iteration is imported, or the directory of one
            iteration.
        hf_config: Hugging Face directory with ``config.json`` and tokenizer of the model, or the path of its
            ``config.json``. Weights there are not read.
        target: a new or empty directory.
        dtype: dtype of the stored weights.
        num_workers: worker processes of this rank. None: one for each core.
        part_bytes: as in ``import_hf``.

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
        plan = run_on_all_ranks(lambda: _MegatronImport.of(directory, assets, dtype))
        record = import_provenance(directory, assets, dtype)
        stream_import(
            target,
            plan.maps,
            dtype,
            convert=plan.convert,
            finish=lambda aside: _finish(assets, aside, record),
            record=record,
            num_workers=num_workers,
            part_bytes=part_bytes,
        )
    return len(plan.maps)


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


@dataclass(frozen=True)
class _MegatronImport:
    """A checkpoint that is imported: where each tensor of the model is stored in it. ``convert`` reads them."""

    reader: SliceReader
    maps: Sequence[ParamMapping]
    pieces: Mapping[str, tuple[Piece, ...]]
    """Megatron name of a tensor -> the parts of the source that it consists of."""
    dtype: torch.dtype

    @classmethod
    def of(cls, directory: Path, assets: Path, dtype: torch.dtype) -> "_MegatronImport":
        """Find every tensor, after checking that the checkpoint fits the config. Reads no weight."""
        config, (rank, _) = read_json(assets / "config.json"), rank_and_size()
        if rank == 0:
            find_files(assets, ASSETS)  # raises now instead of after gigabytes are written
        family = family_of(config)
        family.megatron_args(config)  # raises an error if training could not build the model
        if family.passthrough_tensors(config):
            raise QADError(
                f"{assets / 'config.json'}: {family.architecture} has tensors outside the language model, which this "
                "import cannot read. Import the Hugging Face model (megatron-qad import)."
            )
        maps, reader = family.tensors(config), SliceReader(directory)
        stored = _weights(reader, verbose=rank == 0)
        settings, text = read_settings(directory)
        check_settings(settings, text, config, gpt=is_gpt(stored, directory))
        if not settings and rank == 0:
            print(
                f"megatron_qad: WARNING: {text} Settings that tensors do not show (rotary base, norm epsilon, number "
                "of heads, router) are taken from config.json."
            )
        return cls(reader, maps, locate(maps, stored, directory), dtype)

    def convert(self, tensor_map: ParamMapping) -> Iterator[tuple[str, torch.Tensor]]:
        """Read one tensor and yield the parts in which Megatron stores it, with their names."""
        pieces, parts = self.pieces[tensor_map.megatron], []
        for piece, part in zip(pieces, self.reader.read([piece.slice for piece in pieces]), strict=True):
            where = f"{self.reader.directory}: {piece.name}{list(piece.index) or ''}"
            target = stored_dtype(tensor_map, self.dtype)
            parts.append(finite.cast(part.reshape(piece.shape), target, where, "Import with --dtype float32."))
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return stored_parts(tensor_map, tensor[: tensor_map.shape[0]].contiguous())  # without vocabulary padding


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


def _finish(assets: Path, aside: Path, record: dict) -> None:
    """Write the files next to the weights; called on the first rank."""
    copy_assets(assets, aside / "hf")
    json_records.write(aside / IMPORT_FILE, record)


def import_provenance(directory: Path, assets: Path, dtype: torch.dtype) -> dict:
    """Return the provenance record of an import of the iteration ``directory``."""
    return provenance.megatron_provenance(directory, assets, str(dtype).removeprefix("torch."))
