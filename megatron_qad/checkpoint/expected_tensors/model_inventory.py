"""``Inventory``: tensors, linears and fused groups that a Hugging Face checkpoint must hold."""

from dataclasses import dataclass, field
from typing import Any

from megatron_qad.engine.errors import QADError


@dataclass
class Inventory:
    """Tensors and linears of a model, as transformers names them."""

    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)  # stored as they are: norms, embeddings, biases
    linears: dict[str, tuple[int, int]] = field(default_factory=dict)  # module -> [N, K]; may be quantized
    fused: list[tuple[str, ...]] = field(
        default_factory=list
    )  # linears that a server merges and that share their scales
    never_quantized: list[str] = field(default_factory=list)  # linear to a server, never quantized
    float32: set[str] = field(default_factory=set)  # of ``tensors``, those that stay in float32
    passthrough_prefixes: tuple[
        str, ...
    ] = ()  # what names of tensors begin with that no inventory lists and that stay as they were
    required: tuple[str, ...] = ()  # those of ``carried`` that must be there
    attentions: list[tuple[str, str]] = field(default_factory=list)  # key and value projection of each attention layer
    tied_head: bool = False  # lm_head.weight is model.embed_tokens.weight and need not be stored
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head"

    def is_passthrough(self, name: str) -> bool:
        return name.startswith(self.passthrough_prefixes)

    def excluded(self, quantized) -> set[str]:
        """What the configurations must exclude where these linears are quantized."""
        return (set(self.linears) | set(self.never_quantized)) - set(quantized)


def positive_integer(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """An entry of config.json that must be a positive integer; ``default`` where it is missing or null."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise QADError(f"config.json: {key} is {value!r}, expected a positive integer.")
    return value
