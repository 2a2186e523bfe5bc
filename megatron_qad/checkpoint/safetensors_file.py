"""Writes safetensors files whose tensors arrive in any order, from any process.

The header needs dtypes and shapes only, so it is written first, and every tensor then has its place. The bytes of the
file are those of ``safetensors.torch.save_file``: 8 bytes of length, a JSON header padded to a multiple of 8, and the
tensors ordered by dtype and name, which aligns every tensor.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Name of each dtype in the file, in the order of the tensors."""
_BY_NAME = {name: (order, dtype.itemsize) for order, (dtype, name) in enumerate(DTYPES.items())}

Spec = tuple[str, tuple[int, ...]]
"""dtype, as safetensors calls it, and shape of a tensor."""


def spec_of(tensor: torch.Tensor) -> Spec:
    return DTYPES[tensor.dtype], tuple(tensor.shape)


def num_bytes(spec: Spec) -> int:
    return math.prod(spec[1]) * _BY_NAME[spec[0]][1]


@dataclass(frozen=True)
class Layout:
    """The places of tensors in a file."""

    header: bytes
    places: Mapping[str, tuple[int, Spec]]
    """Name -> (offset in the file, dtype and shape)."""
    size: int
    """Size of the file in bytes."""

    @classmethod
    def of(cls, specs: Mapping[str, Spec]) -> "Layout":
        """Return the layout of a file with these tensors."""
        entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        starts, end = {}, 0
        for name in sorted(specs, key=lambda name: (_BY_NAME[specs[name][0]][0], name)):
            dtype, shape = specs[name]
            starts[name], end = end, end + num_bytes(specs[name])
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        return cls(header, {name: (len(header) + starts[name], specs[name]) for name in specs}, len(header) + end)

    @property
    def digest(self) -> str:
        """SHA-256 of the header: names, dtypes, shapes and places."""
        return hashlib.sha256(self.header).hexdigest()

    def create(self, file: Path) -> None:
        """Create the file with its header. FileExistsError if there is a file or link of that name."""
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(self.header)
            stream.truncate(self.size)

    def write(self, descriptor: int, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place in the open file."""
        offset, spec = self.places[name]
        if spec_of(tensor) != spec:
            raise ValueError(f"{name} is {spec_of(tensor)}, expected {spec}")
        data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written


def write_file(file: Path, specs: Mapping[str, Spec], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a file with the tensors ``specs``, taken one by one from ``tensors``. Raises OSError."""
    layout = Layout.of(specs)
    layout.create(file)
    with open(file, "r+b") as stream:
        for name, tensor in tensors:
            layout.write(stream.fileno(), name, tensor)
