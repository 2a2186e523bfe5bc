"""The ``Inventory`` dataclass: tensors, linears and fused groups that a Hugging Face checkpoint must have."""

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_qad.engine import config_values as values


@dataclass
class Inventory:
    """Expected tensors and linears of a model, by their names in transformers."""

    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensors that are never quantized (norms, embeddings, biases): name -> shape."""
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Linears that may be quantized: module -> [N, K]."""
    fused: list[tuple[str, ...]] = field(default_factory=list)
    """Groups of linears that servers fuse and that must share their scales."""
    experts: list[tuple[str, ...]] = field(default_factory=list)
    """Linears of all experts of a layer, one tuple per layer, which servers compute in one format."""
    never_quantized: list[str] = field(default_factory=list)
    """Modules that servers build as linears but that are never quantized."""
    float32: set[str] = field(default_factory=set)
    """Names in ``tensors`` that stay in float32."""
    passthrough_prefixes: tuple[str, ...] = ()
    """Prefixes of tensor names that are not listed here and are passed through unchanged."""
    carried: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensors with one of ``passthrough_prefixes`` that must exist, in any floating-point dtype: name -> shape."""
    required: tuple[str, ...] = ()
    """Prefixes in ``passthrough_prefixes`` for which tensors must exist."""
    attentions: list[tuple[str, str]] = field(default_factory=list)
    """Key and value projection of each attention layer."""
    tied_head: bool = False
    """Whether lm_head.weight is model.embed_tokens.weight and need not be stored."""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head"

    def is_passthrough(self, name: str) -> bool:
        """Whether a tensor or module is passed through unchanged."""
        return name.startswith(self.passthrough_prefixes)

    def excluded(self, quantized) -> set[str]:
        """Return the modules that the configurations must exclude if the given linears are quantized.

        A head with a prefix is excluded under its last name, too, because some servers look for that.
        """
        excluded = (set(self.linears) | set(self.never_quantized)) - set(quantized)
        return excluded | {self.head.rsplit(".", 1)[-1]} if self.head in excluded else excluded

    def prefixed(self, prefix: str) -> "Inventory":
        """Return the inventory of the same model inside another one, with all names behind ``prefix``."""

        def names(modules):
            return tuple(f"{prefix}{module}" for module in modules)

        return replace(
            self,
            tensors={f"{prefix}{name}": shape for name, shape in self.tensors.items()},
            linears={f"{prefix}{name}": shape for name, shape in self.linears.items()},
            fused=[names(group) for group in self.fused],
            experts=[names(group) for group in self.experts],
            never_quantized=list(names(self.never_quantized)),
            float32=set(names(self.float32)),
            passthrough_prefixes=names(self.passthrough_prefixes),
            attentions=[names(pair) for pair in self.attentions],
            embedding=f"{prefix}{self.embedding}",
            head=f"{prefix}{self.head}",
        )


def positive_integer(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """Return a positive integer entry of config.json; ``default`` if it is missing or null."""
    return values.integer(config, key, values.REQUIRED if default is None else default)


def is_set(config: dict[str, Any], key: str, default: bool = False) -> bool:
    """Return a boolean entry of config.json."""
    return values.flag(config, key, default)


def num_layers(config: dict[str, Any]) -> int:
    """Return ``num_hidden_layers``."""
    return values.integer(config, "num_hidden_layers", maximum=values.MAX_LAYERS)


def num_experts(config: dict[str, Any], key: str, num_expert_layers: int) -> int:
    """Return the number of experts in each of some layers."""
    return values.integer(config, key, maximum=values.MAX_EXPERTS // max(num_expert_layers, 1))
