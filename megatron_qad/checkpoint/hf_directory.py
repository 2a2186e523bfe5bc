"""Read and check the shards of an HF checkpoint directory without loading tensors: headers, index, truncation.

The safetensors header (eight bytes of length, JSON, data) is parsed here because damage must be reported as a list of
issues, not as an exception of the library for the first one. This module does not depend on models or quantization.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_qad.engine import text_files
from megatron_qad.engine.errors import QADError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "BOOL": 1,
}

_MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors library reads."""

AddIssue = Callable[[str, str], None]  # (name of the tensor or file, value found and value expected)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor entry in a shard's header."""

    file: Path
    dtype: str  # dtype name of safetensors: "U8", "F8_E4M3", "F32", "BF16", ...
    shape: tuple[int, ...]
    num_bytes: int


@dataclass
class Shards:
    """All tensors of a checkpoint directory."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    num_bytes: int = 0
    readable: set[Path] = field(default_factory=set)  # files with complete data


def read_shards(directory: Path, issue: AddIssue) -> Shards:
    """Read the header of every shard and compare it with the index, if there is one. Report issues to ``issue``."""
    shards = Shards()
    index_path, single = directory / INDEX_NAME, directory / SINGLE_NAME
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    weight_map: dict[str, str] | None = None
    total_size = None
    if index_path.exists():
        weight_map, total_size = _read_index(index_path, issue)
        if single.exists():
            issue(
                SINGLE_NAME,
                f"exists together with {INDEX_NAME}; expected only one, because loaders differ in which they read",
            )
    elif not single.exists():
        issue(str(directory), f"has neither {SINGLE_NAME} nor {INDEX_NAME}; found shards {present}")
    listed = set(weight_map.values()) if weight_map is not None else {SINGLE_NAME} & set(present)
    for name in sorted(set(present) - listed - {SINGLE_NAME}):
        issue(name, "is a shard that is not in the index")
    for name in sorted(listed):
        if not (directory / name).is_file():
            issue(name, f"is listed in {INDEX_NAME}, but missing")
            continue
        for tensor, stored in _read_header(directory / name, shards, issue).items():
            if tensor in shards.tensors:
                issue(tensor, f"is in two shards, {shards.tensors[tensor].file.name} and {name}")
            shards.tensors[tensor] = stored
            shards.num_bytes += stored.num_bytes
    if weight_map is not None:
        _compare_with_index(weight_map, total_size, shards, issue)
    return shards


def read_json(path: Path, issue: AddIssue) -> dict[str, Any] | None:
    """Return the JSON object in ``path``; None, and an issue, if it is missing or not an object."""
    if not path.is_file():
        issue(path.name, "is missing")
        return None
    try:
        return text_files.read_json(path)
    except QADError as error:
        issue(path.name, str(error).removeprefix(f"{path}: "))
        return None


def _read_index(path: Path, issue: AddIssue) -> tuple[dict[str, str], Any]:
    """Return the map from tensor names to file names, and the total size, of an index."""
    if (index := read_json(path, issue)) is None:
        return {}, None
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        issue(path.name, "has no weight_map, expected a map from tensor names to file names")
        weight_map = {}
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _compare_with_index(weight_map: dict[str, str], total: Any, shards: Shards, issue: AddIssue) -> None:
    for tensor, name in weight_map.items():
        stored = shards.tensors.get(tensor)
        if stored is None:
            issue(tensor, f"is listed in {INDEX_NAME}, but not in {name}")
        elif stored.file.name != name:
            issue(tensor, f"is in {stored.file.name}, but {INDEX_NAME} lists {name}")
    for tensor in sorted(set(shards.tensors) - set(weight_map)):
        issue(tensor, f"is in {shards.tensors[tensor].file.name}, but not in {INDEX_NAME}, so loaders will not find it")
    if shards.tensors and total is not None and total != shards.num_bytes:
        issue(INDEX_NAME, f"has total_size {total}, but the tensors of the shards have {shards.num_bytes} bytes")


def _read_header(path: Path, shards: Shards, issue: AddIssue) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length == 0 or 8 + length > size:
            issue(path.name, f"is truncated or not a safetensors file: {size} bytes are too few for its header")
            return {}
        if length > _MAX_HEADER_BYTES:
            issue(path.name, f"has a header of {length} bytes, more than the {_MAX_HEADER_BYTES} that loaders read")
            return {}
        try:
            header = text_files.parse_json(file.read(length), "has an unreadable header", "Export it again.")
        except QADError as error:
            issue(path.name, str(error))
            return {}
    if not isinstance(header, dict):
        issue(path.name, f"has an unreadable header: a {type(header).__name__}, expected a JSON object")
        return {}
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for tensor, entry in header.items():
        try:
            first, last = (int(offset) for offset in entry["data_offsets"])
            shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
        except (KeyError, TypeError, ValueError, OverflowError):
            issue(path.name, f"has an unreadable header: the entry of {tensor!r} is {entry!r}")
            return {}
        end = max(end, last)
        if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != last - first:
            issue(
                tensor, f"is {dtype} {list(shape)}, which does not match the {last - first} bytes stored in {path.name}"
            )
        tensors[tensor] = StoredTensor(path, dtype, shape, last - first)
    if 8 + length + end != size:
        issue(path.name, f"has {size} bytes, expected {8 + length + end} by its header: truncated or written twice")
    else:
        shards.readable.add(path)
    return tensors
