"""Sizes of a model that determine what its layers keep for the backward pass, by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED
from megatron_qad.models.families import text_config
from megatron_qad.models.families.base import Family, ParamMapping


@dataclass(frozen=True)
class PlannedModel:
    """A model of a planned job: its config, and the formats of its linears."""

    family: Family
    hf: dict
    """Content of config.json."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Format of each linear, by Megatron weight name; linears that are left out are not quantized."""
    quantizes_kv: bool = False
    """Whether keys and values are fake-quantized."""

    @cached_property
    def tensors(self) -> list[ParamMapping]:
        return self.family.tensors(self.hf)

    @cached_property
    def args(self) -> dict:
        """Megatron's options of the model's shape."""
        return self.family.megatron_args(self.hf)

    @cached_property
    def pattern(self) -> str:
        """Layer pattern, not split into stages."""
        return self.family.layer_pattern(self.hf).replace("|", "")

    @property
    def hidden_size(self) -> int:
        return text_config(self.hf)["hidden_size"]

    @property
    def vocab_size(self) -> int:
        return text_config(self.hf)["vocab_size"]

    @property
    def is_tied(self) -> bool:
        """Whether the output layer shares the embedding's weight."""
        return not any(tensor.kind == "head" for tensor in self.tensors)

    @cached_property
    def by_layer(self) -> list[dict[str, ParamMapping]]:
        """The tensors of each layer by their names in it, such as ``mlp.linear_fc1.weight``; of the routed experts only
        those of the first, which all others equal in shape."""
        layers: list[dict[str, ParamMapping]] = [{} for _ in self.pattern]
        for tensor in self.tensors:
            if tensor.layer is not None:
                layers[tensor.layer].setdefault(tensor.megatron.split(".", 3)[3], tensor)
        return layers

    def quantizes_input(self, tensor: ParamMapping) -> bool:
        """Whether the input of a linear is fake-quantized."""
        return FORMATS[self.formats.get(tensor.megatron, UNQUANTIZED.name)].input is not None
