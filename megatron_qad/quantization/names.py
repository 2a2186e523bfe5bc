"""Global module names of model chunks. Megatron counts from ``decoder.layers.0`` on every pipeline stage."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from megatron.core.utils import unwrap_model

_LOCAL_EXPERT = re.compile(r"(.*\.experts)\.local_experts\.(\d+)(\..*|$)")
_EXPERT = re.compile(r"(\.experts\.)(\d+)(\.)")


def named_modules_globally(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules of a model chunk, wrapped or not, with their names in checkpoints: with the layer index in the
    full model, and as ``experts.experts.N`` with the expert index over all expert-parallel ranks."""
    chunk = unwrap_model(chunk)
    layers = getattr(chunk.decoder, "layers", [])
    global_index = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(layers)}
    first_expert = {}
    for name, module in chunk.named_modules():
        if name.endswith(".experts") and hasattr(module, "local_experts"):
            first_expert[name] = module.ep_group.rank() * module.num_local_experts
        if expert := _LOCAL_EXPERT.fullmatch(name):
            name = f"{expert[1]}.experts.{first_expert[expert[1]] + int(expert[2])}{expert[3]}"
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
            parts[2] = global_index[parts[2]]
        yield ".".join(parts), module


def is_expert(name: str) -> bool:
    """Whether a linear belongs to a routed expert. Expert-parallel ranks hold different experts."""
    return _EXPERT.search(name) is not None


def sibling_experts(names: Iterable[str]) -> dict[str, list[str]]:
    """Map the name of each expert linear to the names of the same linear in all experts of its layer, including itself.
    Siblings share one list. Linears outside experts are left out."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if is_expert(name):
            groups[_EXPERT.sub(r"\1*\3", name)].append(name)
    return {name: group for group in groups.values() for name in group}
