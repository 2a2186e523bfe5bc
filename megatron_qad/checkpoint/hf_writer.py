"""Write an HF checkpoint directory from a stream of tensors: shards of bounded size, index, configs, tokenizer files.

Everything is written to a hidden sibling directory that is renamed at the end, so a failure (an exception, a full disk,
a killed process) never leaves a directory that looks complete. At most one shard is held in memory. One process calls
this; tensors are not gathered over ranks here.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_qad.checkpoint import safetensors_file
from megatron_qad.checkpoint.layout_configs import hf_quant_config, quantization_config
from megatron_qad.checkpoint.layouts import (
    HFTensor,
    LayoutName,
    check_layout,
    exclusions,
    stored_tensors,
)
from megatron_qad.checkpoint.model_directory import copy_files, find_files
from megatron_qad.checkpoint.transformers_support import refused_by_transformers, transformers_problem
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, locks, manifest, new_files
from megatron_qad.engine.run_directory.run_files import CALIBRATION_FILE, EXPORT_FILE
from megatron_qad.formats.format_registry import UNQUANTIZED

# Files needed by servers and tokenizers in addition to weights and config.json; *.py for models with their own code.
COPIED_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",  # this and the next are required by Llama's licence
    "USE_POLICY*",
)
DEFAULT_SHARD_BYTES = 2_000_000_000  # a shard is hashed by one process while others pack the next ones
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Written:
    """Summary of a written checkpoint."""

    directory: Path
    num_tensors: int
    num_bytes: int  # size of tensor data
    shards: tuple[str, ...]  # file names
    quantized: dict[str, str]  # module -> format
    excluded: tuple[str, ...]  # linears that are not quantized
    transformers_problem: str | None = None  # why transformers cannot compute with it
    dtype: str | None = None  # of the tensors that are not packed; None means that of each in the checkpoint


def write_hf_checkpoint(
    items: Iterable[HFTensor],
    directory: str | Path,
    *,
    config: dict[str, Any],
    layout: LayoutName,
    linear_modules: Sequence[str],
    source: str | Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    kv_cache: str = "bf16",
    record: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> Written:
    """Write ``items``, in their order, as the HF checkpoint ``directory``.

    Args:
        items: the model's tensors by HF name, each name once, without tied heads. The caller must not modify a tensor
            after yielding it, because it is held in memory until its shard is full.
        directory: a new or empty directory, or a link to one.
        config: contents of config.json, with ``quantization_config`` added for packed layouts.
        layout: "bf16", "modelopt" or "compressed-tensors".
        linear_modules: names of all linears of the model, including ``lm_head``; those that are not quantized are
            excluded in the configurations.
        source: HF directory whose tokenizer, chat template and generation config are copied; None: nothing is copied.
        max_shard_bytes: maximum size of a shard's tensor data; a larger tensor gets its own shard.
        kv_cache: one of ``KV_CACHE_FORMATS``, whose scales are among ``items``; recorded in the configurations.
        record: provenance of the checkpoint; written to it together with the hashes of all its files.
        calibration: content of calibration.json (``calibration_record``); None: it is not written.

    Raises:
        QADError: a non-empty directory or a mount point, a full disk, a duplicate name, and errors of
            ``stored_tensors``.
    """
    directory = new_directory(directory)
    description = describe(
        config=config,
        layout=layout,
        linear_modules=linear_modules,
        source=source,
        max_shard_bytes=max_shard_bytes,
        kv_cache=kv_cache,
        record=record,
        calibration=calibration,
    )
    aside = directory.parent / f".{directory.name}.partial"
    shards = _Shards(aside, max_shard_bytes)
    with ExitStack() as stack:
        stack.enter_context(locks.lock_output(directory))
        new_files.make_new_directory(aside)  # removes what a killed process left
        stack.callback(shutil.rmtree, aside, ignore_errors=True)  # does nothing after a successful rename
        try:
            formats = {
                item.module: item.fmt
                for item in _write_items(items, shards, layout)
                if item.module is not None and item.fmt != UNQUANTIZED.name and layout != "bf16"
            }
            shards.finish()
            excluded = description.write(aside, formats)
            for path in (*aside.rglob("*"), aside):
                manifest.sync(path)
            os.rename(aside, directory)  # atomic; replaces an empty directory
            manifest.sync(directory.parent)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise _disk_full(directory, shards) from error
            raise
    return Written(
        directory,
        len(shards.weight_map),
        shards.num_bytes,
        tuple(shards.names),
        formats,
        tuple(excluded),
        transformers_problem(config, layout, formats),
    )


@dataclass(frozen=True)
class Description:
    """The files of a checkpoint besides its weights. The fields are arguments of ``write_hf_checkpoint``."""

    config: dict[str, Any]
    layout: LayoutName
    linear_modules: Sequence[str]
    source: Path | None
    kv_cache: str
    record: Mapping[str, Any] | None
    calibration: Mapping[str, Any] | None = None

    def write(
        self, directory: Path, formats: dict[str, str], sums: Mapping[str, manifest.Sum] | None = None
    ) -> list[str]:
        """Write configurations, copied files and the provenance record.

        Args:
            formats: module -> format of the quantized linears.
            sums: known sums of files in ``directory``; the others are hashed here.

        Returns:
            The linears that are not quantized.
        """
        sums = sums or {}
        excluded = exclusions(self.linear_modules, formats) if self.layout != "bf16" else []
        if self.source is not None:
            copy_files(self.source, directory, COPIED_FILES)
        _write_configs(directory, self.config, self.layout, excluded, formats, self.kv_cache)
        if self.calibration is not None and self.layout != "bf16":
            json_records.write(directory / CALIBRATION_FILE, self.calibration)
        if self.record is not None:
            others = [name for name in manifest.files_in(directory) if name not in sums]
            all_sums = dict(sorted({**sums, **manifest.sums_of(directory, others)}.items()))
            json_records.write(directory / EXPORT_FILE, {**self.record, "files": all_sums})
        return excluded


def _write_items(items: Iterable[HFTensor], shards: "_Shards", layout: LayoutName) -> Iterable[HFTensor]:
    """Add the items to the shards and yield them again."""
    for item in items:
        shards.add(stored_tensors(item, layout))
        yield item


class _Shards:
    """Writes tensors to shard files. Final file names depend on the number of shards, so they are set at the end."""

    def __init__(self, directory: Path, max_bytes: int):
        self.directory, self.max_bytes = directory, max_bytes
        self.pending: dict[str, Tensor] = {}
        self._data_ptrs: set[int] = set()  # of pending tensors
        self.pending_bytes = self.num_bytes = 0
        self.weight_map: dict[str, int] = {}  # tensor name -> index of its shard
        self.names: list[str] = []  # file names, temporary until finish()

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in self.weight_map or name in self.pending:
                raise QADError(f"{name}: given twice to the checkpoint writer. Give each name once.")
            if self.pending and self.pending_bytes + tensor.nbytes > self.max_bytes:
                self._flush()
            self.pending[name] = tensor = _own_storage(tensor, self._data_ptrs)
            self._data_ptrs.add(tensor.data_ptr())
            self.pending_bytes += tensor.nbytes

    def finish(self) -> None:
        if self.pending or not self.names:
            self._flush()
        if not self.weight_map:
            raise QADError("No tensor was given to the checkpoint writer. Check the export that calls it.")
        final_names = shard_names(len(self.names))
        for old, new in zip(self.names, final_names, strict=True):
            os.rename(self.directory / old, self.directory / new)
        self.names = final_names
        weight_map = {name: final_names[shard] for name, shard in self.weight_map.items()}
        write_index(self.directory, weight_map, self.num_bytes)

    def _flush(self) -> None:
        file_name = f"shard-{len(self.names):05d}.safetensors"
        path = self.directory / file_name
        specs = {name: safetensors_file.spec_of(tensor) for name, tensor in self.pending.items()}
        safetensors_file.write_file(path, specs, self.pending.items())
        manifest.sync(path)
        self.weight_map.update(dict.fromkeys(self.pending, len(self.names)))
        self.names.append(file_name)
        self.num_bytes += self.pending_bytes
        self.pending, self._data_ptrs, self.pending_bytes = {}, set(), 0


def shard_names(num_shards: int) -> list[str]:
    """Return the file names of a checkpoint's shards."""
    if num_shards == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]


def write_index(directory: Path, weight_map: Mapping[str, str], num_bytes: int) -> None:
    """Write the index of several shards; a single one has none.

    Args:
        weight_map: tensor name -> file name.
        num_bytes: size of all tensors.
    """
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(directory / "model.safetensors.index.json", index)


def _own_storage(tensor: Tensor, data_ptrs: set[int]) -> Tensor:
    """Return a contiguous tensor with its own storage: safetensors rejects shared ones, and views keep theirs alive."""
    tensor = tensor.contiguous()
    is_view = tensor.untyped_storage().nbytes() != tensor.nbytes
    is_shared = tensor.nbytes > 0 and tensor.data_ptr() in data_ptrs
    return tensor.clone() if is_view or is_shared else tensor


def new_directory(path: str | Path) -> Path:
    """Return ``path`` with links resolved, after checking that a directory can be renamed to it.

    Raises:
        QADError: a mount point, which cannot be replaced by a rename; a file or a directory that is not empty.
    """
    directory = Path(path).resolve()
    if directory.is_mount():
        raise QADError(
            f"{directory}: is a mount point, which cannot be replaced by renaming the finished output. Give a "
            "directory inside it."
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise QADError(
            f"{directory}: exists and is not empty. Give a new directory or remove this one; it is not overwritten."
        )
    return directory


def describe(
    *,
    config: dict[str, Any],
    layout: LayoutName,
    linear_modules: Sequence[str],
    source: str | Path | None,
    max_shard_bytes: int,
    kv_cache: str,
    record: Mapping[str, Any] | None,
    calibration: Mapping[str, Any] | None = None,
) -> Description:
    """Check arguments of ``write_hf_checkpoint`` before anything is written. Raises QADError."""
    check_layout(layout)
    if max_shard_bytes <= 0:
        raise QADError(f"max_shard_bytes is {max_shard_bytes}, expected a positive number of bytes.")
    if "quantization_config" in config:
        raise QADError(
            "config.json already has a quantization_config; expected the config of a BF16 model. Remove the entry."
        )
    return Description(config, layout, linear_modules, _check_source(source), kv_cache, record, calibration)


def _check_source(source: str | Path | None) -> Path | None:
    if source is not None and not Path(source).is_dir():
        raise QADError(f"{source}: is not a directory. Give the HF checkpoint with the tokenizer and configs to copy.")
    if source is not None:
        find_files(Path(source), COPIED_FILES)  # raises now instead of after gigabytes are written
    return None if source is None else Path(source)


def _write_configs(
    directory: Path, config: dict, layout: LayoutName, excluded: list[str], formats: dict[str, str], kv_cache: str
) -> None:
    config = refused_by_transformers(config, transformers_problem(config, layout, formats))
    if layout != "bf16":
        if not formats:
            raise QADError(
                f"Layout {layout!r} needs quantized tensors, but no tensor is quantized. Check the policy, or use "
                "layout 'bf16'."
            )
        config = {**config, "quantization_config": quantization_config(layout, excluded, formats, kv_cache)}
    if layout == "modelopt":
        _write_json(directory / "hf_quant_config.json", hf_quant_config(excluded, formats, kv_cache))
    _write_json(directory / "config.json", config)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _disk_full(directory: Path, shards: _Shards) -> QADError:
    needed = shards.num_bytes + shards.pending_bytes
    free = shutil.disk_usage(directory.parent).free
    return QADError(
        f"{directory}: the disk is full or a quota is reached. At least {needed} bytes were needed up to shard "
        f"{len(shards.names) + 1}; {free} bytes are free, plus {shards.num_bytes} bytes of finished shards, which are "
        "removed. Free space or choose another file system."
    )
