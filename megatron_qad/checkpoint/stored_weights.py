"""Read an export's tensors one at a time, and decode its quantized weights with the arithmetic of training."""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_qad.checkpoint.hf_directory import Shards
from megatron_qad.checkpoint.layouts import PackedLayout
from megatron_qad.formats.format_registry import FORMATS


class StoredWeights:
    """Reader of the tensors in the shards of an export; a context manager.

    Example::

        with StoredWeights(shards, MODELOPT) as stored:
            linear = stored.linear("model.layers.0.mlp.down_proj", "nvfp4")
            linear.decode(slice(0, 16))  # float32 [16, K]
    """

    def __init__(self, shards: Shards, layout: PackedLayout):
        self._shards, self._layout = shards, layout
        self._open: dict[Path, safe_open] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "StoredWeights":
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """Return a tensor as stored."""
        file = self._shards.tensors[name].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        return self._open[file].get_tensor(name)

    def linear(self, module: str, fmt: str) -> "PackedWeight":
        """Return the stored parts of a quantized linear."""
        stored = self._layout.stored(fmt)
        parts = {
            role: self.read(f"{module}.{part}") for role, (part, _) in stored.parts.items() if role != "input_scale"
        }
        scale = parts.pop("weight_scale", torch.ones(())).float().reshape(())
        return PackedWeight(fmt, parts, 1.0 / scale if stored.is_reciprocal else scale)


class PackedWeight:
    """The codes of one weight and its float32 scale."""

    def __init__(self, fmt: str, codes: dict[str, Tensor], scale: Tensor):
        self._format, self._codes, self._scale = FORMATS[fmt].weight, codes, scale

    def decode(self, rows: slice) -> Tensor:
        """Return rows of the weight, float32 [rows, K]."""
        codes = {role: codes[rows] for role, codes in self._codes.items() if role != "shape"}
        return self._format.dequantize(codes, self._scale, torch.float32)
