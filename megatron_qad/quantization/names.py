"""The global names of a model chunk's modules: what Megatron calls ``decoder.layers.0`` on every pipeline stage."""

import re
from collections.abc import Iterable, Iterator

import torch
from megatron.core.utils import unwrap_model

_EXPERT = re.compile(r"(\.local_experts\.)(\d+)(\.)")  # SequentialMLP's


def named_modules_globally(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules of one (possibly wrapped) model chunk with the layer's index in the whole model in their names."""
    chunk = unwrap_model(chunk)
    layers = getattr(chunk.decoder, "layers", [])
    global_index = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(layers)}
    for name, module in chunk.named_modules():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
            parts[2] = global_index[parts[2]]
        yield ".".join(parts), module


def sibling_experts(name: str, names: Iterable[str]) -> list[str]:
    """The other ``names`` that are the same linear of another expert of the same layer; none for other linears."""
    pattern = _EXPERT.sub(r"\1*\3", name)
    if pattern == name:
        return []
    return [other for other in names if other != name and _EXPERT.sub(r"\1*\3", other) == pattern]
