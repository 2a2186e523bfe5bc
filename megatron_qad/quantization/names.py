"""Global names of modules and weights of model chunks, as in checkpoints.

Megatron counts from ``decoder.layers.0`` on every pipeline stage, and from the first local expert on every
expert-parallel rank. Names here count over the full model. A module that holds the linears of all local experts has "*"
in place of the expert's index (``decoder.layers.1.mlp.experts.experts.*.linear_fc1``); each of its weights has a name
of its own.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

ALL_EXPERTS = "*"
"""Index in the names of modules and quantizers that all experts of a layer share."""
_GROUPED = re.compile(r"(.*\.experts)\.(linear_fc[12](\..*)?)")
_EXPERT = re.compile(r"(\.experts\.)(\d+|\*)(?=\.)")


def named_modules_globally(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules of a model chunk, wrapped or not, with their global names."""
    chunk = unwrap_model(chunk)
    layers = getattr(chunk.decoder, "layers", [])
    global_index = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(layers)}
    for name, module in chunk.named_modules():
        if grouped := _GROUPED.fullmatch(name):
            name = f"{grouped[1]}.experts.{ALL_EXPERTS}.{grouped[2]}"
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
            parts[2] = global_index[parts[2]]
        yield ".".join(parts), module


@dataclass(frozen=True)
class LinearWeight:
    """Where the weight [out, in] of a linear is stored: a parameter, or one expert's part of a parameter."""

    parameter: torch.nn.Parameter
    expert: int | None = None
    """Index among the local experts, whose weights are one parameter [experts, out, in]. None means a 2-D parameter."""

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return this linear's part of the parameter, or of a tensor of its shape (``main_grad``), as a view."""
        return tensor if self.expert is None else tensor[self.expert]


def linear_weights(name: str, module: torch.nn.Module) -> dict[str, LinearWeight]:
    """Return the weights that a module holds, by global name: one, or one per local expert.

    Args:
        name: name of the module, from ``named_modules_globally``.
        module: a linear, or all local experts' linears with ``first_expert`` and a weight [experts, out, in].
    """
    if not name_is_shared(name):
        return {f"{name}.weight": LinearWeight(module.weight)}
    return {
        f"{of_expert(name, module.first_expert + i)}.weight": LinearWeight(module.weight, i)
        for i in range(len(module.weight))
    }


class WeightViews(Mapping):
    """The weights by name: parameters, and for experts views without a gradient.

    A view is made at each access, because Megatron moves the parameters' storage when it wraps a model."""

    def __init__(self, weights: Mapping[str, LinearWeight]):
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        return weight.parameter if weight.expert is None else weight.part_of(weight.parameter.data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def is_expert(name: str) -> bool:
    """Whether a name belongs to routed experts: to one, or to all of a layer."""
    return _EXPERT.search(name) is not None


def name_is_shared(name: str) -> bool:
    """Whether a name belongs to all experts of a layer."""
    return f".{ALL_EXPERTS}." in name


def of_expert(name: str, index: int) -> str:
    """Return the name of one expert's linear, from the name that all experts of its layer share."""
    return name.replace(ALL_EXPERTS, str(index))


def of_all_experts(name: str) -> str:
    """Return the name that all experts of a layer share, from the name of one; other names are returned unchanged."""
    return _EXPERT.sub(rf"\1{ALL_EXPERTS}", name)
