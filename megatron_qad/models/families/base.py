"""The ``Family`` interface, and the mappings between Megatron and Hugging Face tensors.

A mapping relates one Megatron tensor, by its global (unsharded) name in a torch_dist checkpoint, to the Hugging Face
tensors it is made of. Both directions are exact: they copy values and never compute. Megatron is not imported here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_qad.models.families.radio_vision import VisionSettings


@dataclass(frozen=True)
class ParamMapping:
    """Mapping between one Megatron tensor and the Hugging Face tensors it is made of, in order.

    Example::

        mapping = ParamMapping("decoder.final_norm.weight", ("model.norm.weight",), "norm", (64,))
        weight = mapping.to_megatron([torch.ones(64)])
        mapping.to_hf(weight)  # a list of one tensor, for "model.norm.weight"
    """

    megatron: str
    hf: tuple[str, ...]
    kind: str
    """Kind of the tensor for quantization policies: "attention", "mamba", "mlp", "expert", "latent", "shared_expert",
    "router", "head", "embedding", "norm", "conv1d" or "vision"."""
    shape: tuple[int, ...]
    """Global shape of the Megatron tensor without vocabulary padding."""
    layer: int | None = None
    """Index in the layer pattern. None outside the decoder."""
    is_linear: bool = False
    """Whether the tensor is the weight [out, in] of a GEMM, which a policy may quantize."""
    is_tied: bool = False
    """Whether the tensor is an output head that shares the embedding's weight."""
    is_float32: bool = False
    """Whether the tensor is float32 in a model of any precision (a router's correction bias)."""
    never_quantized: bool = False
    """Whether servers load the weight as a linear, but no policy quantizes it (conv1d, Qwen3-MoE's router, the vision
    encoder). The exclusion list of a quantized checkpoint names it."""

    def hf_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the Hugging Face tensors."""
        return [self.shape]

    def to_megatron(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Return the Megatron tensor for the Hugging Face tensors."""
        return tensors[0]

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the Hugging Face tensors for the Megatron tensor."""
        return [tensor]

    @property
    def checkpoint_splits(self) -> dict[str, int]:
        """Parts in which a torch_dist checkpoint stores the tensor: name suffix -> number of rows.

        Each part is sharded separately.
        """
        return {"": self.shape[0]}

    @property
    def megatron_module(self) -> str:
        """Name of the Megatron module that owns the tensor."""
        return self.megatron.rsplit(".", 1)[0]


@dataclass(frozen=True)
class GatedMLPMapping(ParamMapping):
    """Mapping of Hugging Face tensors that are concatenated along the rows: gate and up in ``linear_fc1``."""

    rows: tuple[int, ...] = ()
    """Rows of each Hugging Face tensor."""

    def hf_shapes(self):
        return [(rows, *self.shape[1:]) for rows in self.rows]

    def to_megatron(self, tensors):
        return torch.cat(tensors)

    def to_hf(self, tensor):
        return list(tensor.split(self.rows))


@dataclass(frozen=True)
class ExpertGatedMLPMapping(GatedMLPMapping):
    """Mapping of gate and up of one expert, which Megatron stores as two tensors."""

    @property
    def checkpoint_splits(self):
        return dict(zip(("_w", "_v"), self.rows, strict=True))


@dataclass(frozen=True)
class QKVMapping(ParamMapping):
    """Mapping of q, k, v in ``linear_qkv`` (weights or biases): queries, key and value of each group in turn."""

    num_heads: int = 0
    num_groups: int = 0
    head_dim: int = 0

    def hf_shapes(self):
        return [
            (heads * self.head_dim, *self.shape[1:]) for heads in (self.num_heads, self.num_groups, self.num_groups)
        ]

    def to_megatron(self, tensors):
        grouped = [t.reshape(self.num_groups, -1, self.head_dim, *self.shape[1:]) for t in tensors]
        return torch.cat(grouped, dim=1).reshape(self.shape)

    def to_hf(self, tensor):
        num_queries = self.num_heads // self.num_groups
        grouped = tensor.reshape(self.num_groups, num_queries + 2, self.head_dim, *self.shape[1:])
        return [part.reshape(-1, *self.shape[1:]) for part in grouped.split((num_queries, 1, 1), dim=1)]


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture, described by functions of its ``config.json``."""

    architecture: str
    """Entry of ``architectures`` in config.json."""
    model_type: str
    """``model_type`` in config.json."""
    layer_pattern: Callable[[dict], str]
    """config -> layer pattern of ``HybridModel``, one symbol per layer (``LAYER_KINDS``)."""
    megatron_args: Callable[[dict], dict]
    """config -> Megatron argument names and values. True means a flag without a value."""
    tensors: Callable[[dict], list[ParamMapping]]
    """config -> every tensor of the Megatron model."""
    rope_scaling: Callable[[dict], dict | None]
    """config -> llama3 rope scaling. None means plain rope, or no rope."""
    mlp_widths: Callable[[dict], tuple[int, ...] | None] = lambda hf_config: None
    """config -> inner MLP width of each layer of the pattern, 0 for layers without MLP. None means that all MLPs have
    ``ffn-hidden-size``."""
    text_config: Callable[[dict], dict] = lambda hf_config: hf_config
    """config -> config of the language model that Megatron builds, for wrappers such as vision-language models."""
    passthrough_prefixes: tuple[str, ...] = ()
    """Prefixes of Hugging Face tensors that are not part of the Megatron model and are passed through from import to
    export unchanged: multi-token prediction layers, a vision encoder."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Tensor names saved by transformers 5 -> names on the hub, which are read and written here."""
    passthrough_tensors: Callable[[dict], list[ParamMapping]] = lambda hf_config: []
    """config -> the passthrough tensors that are known from the config alone."""
    vision: "Callable[[dict], VisionSettings] | None" = None
    """config -> settings of the vision encoder and the projector. None: a language model."""
    config_keys: frozenset[str] = frozenset()
    """Keys of config.json that its models have. The refusal of another model finds the nearest family by them."""

    def layer_kinds(self, hf_config: dict) -> list[str]:
        """Return the kind of every layer of the pattern, as named in policies."""
        return [LAYER_KINDS[symbol] for symbol in self.layer_pattern(hf_config).replace("|", "")]

    def linear_modules(self, hf_config: dict) -> list[str]:
        """Return the Hugging Face names of all modules that servers load as linears.

        Those that are not quantized belong on the exclusion list.
        """
        fixed = [tensor for tensor in self.all_tensors(hf_config) if tensor.never_quantized]
        return [name.removesuffix(".weight") for tensor in (*self.linears(hf_config), *fixed) for name in tensor.hf]

    def all_tensors(self, hf_config: dict) -> list[ParamMapping]:
        """Return every tensor of the Hugging Face model that is known from its config."""
        return [*self.tensors(hf_config), *self.passthrough_tensors(hf_config)]

    def linears(self, hf_config: dict) -> list[ParamMapping]:
        """Return the weights of all GEMMs in model order, the head last. A tied head is included as ``is_tied``."""
        tensors = self.tensors(hf_config)
        linears = [tensor for tensor in tensors if tensor.is_linear]
        if not any(tensor.kind == "head" for tensor in linears):
            embedding = next(tensor for tensor in tensors if tensor.kind == "embedding")
            head = ParamMapping(
                "output_layer.weight", ("lm_head.weight",), "head", embedding.shape, is_linear=True, is_tied=True
            )
            linears.append(head)
        return linears


LAYER_KINDS = {"*": "attention", "M": "mamba", "-": "mlp", "E": "expert"}
"""Symbols of the layer pattern of ``HybridModel``. An expert layer includes its router and its shared experts."""
