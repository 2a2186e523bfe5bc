"""What a family declares, and the tensor maps it declares it with.

A map relates one Megatron tensor, by its name in a torch_dist checkpoint (global, unsharded), to the Hugging Face
tensors it holds. Both directions are exact: they copy values and never compute. No Megatron is imported here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from megatron_qad.engine.errors import QADError


@dataclass(frozen=True)
class ParamMapping:
    """One Megatron tensor and the Hugging Face tensors it holds, in order.

    ``kind`` says what the tensor is to a quantization policy: "attention", "mamba", "mlp", "expert", "shared_expert",
    "router", "head", "embedding", "norm", "conv1d" or "vision"; ``layer`` is the index in the layer pattern, None
    outside the decoder.
    """

    megatron: str
    hf: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    """Global shape of the Megatron tensor, vocabulary unpadded."""
    layer: int | None = None
    is_linear: bool = False
    """A GEMM's weight [out, in]: what a policy may quantize."""
    is_tied: bool = False
    """The output head of a model whose head is its embedding: a GEMM without a tensor of its own."""
    is_float32: bool = False
    """Kept in float32 whatever the model's precision (a router's correction bias)."""
    never_quantized: bool = False
    """Linear to a server and quantized by no policy (conv1d, Qwen3-MoE's router, the vision encoder): a packed
    checkpoint's exclusion list names it."""

    def hf_shapes(self) -> list[tuple[int, ...]]:
        return [self.shape]

    def to_megatron(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0]

    def to_hf(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]

    @property
    def checkpoint_splits(self) -> dict[str, int]:
        """How a torch_dist checkpoint holds the tensor: rows by ending of the name, one entry a part that is sharded by
        itself."""
        return {"": self.shape[0]}

    @property
    def megatron_module(self) -> str:
        return self.megatron.rsplit(".", 1)[0]


@dataclass(frozen=True)
class GatedMLPMapping(ParamMapping):
    """Hugging Face tensors stacked along the rows: gate and up in ``linear_fc1``."""

    rows: tuple[int, ...] = ()

    def hf_shapes(self):
        return [(rows, *self.shape[1:]) for rows in self.rows]

    def to_megatron(self, tensors):
        return torch.cat(tensors)

    def to_hf(self, tensor):
        return list(tensor.split(self.rows))


@dataclass(frozen=True)
class ExpertGatedMLPMapping(GatedMLPMapping):
    """Gate and up of one expert, which Megatron stores apart where it stores experts one by one."""

    @property
    def checkpoint_splits(self):
        return dict(zip(("_w", "_v"), self.rows, strict=True))


@dataclass(frozen=True)
class QKVMapping(ParamMapping):
    """q, k, v in ``linear_qkv``: for each query group its queries, its key, its value (weights and biases alike)."""

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
        queries = self.num_heads // self.num_groups
        grouped = tensor.reshape(self.num_groups, queries + 2, self.head_dim, *self.shape[1:])
        return [part.reshape(-1, *self.shape[1:]) for part in grouped.split((queries, 1, 1), dim=1)]


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture. Everything is a function of its ``config.json``."""

    architecture: str
    layer_pattern: Callable[[dict], str]
    """config -> HybridModel's pattern, one symbol a layer (``LAYER_KINDS``)."""
    megatron_args: Callable[[dict], dict]
    """config -> Megatron argument names and values (True: a flag without a value)."""
    tensors: Callable[[dict], list[ParamMapping]]
    """config -> every tensor of the Megatron model."""
    rope_scaling: Callable[[dict], dict | None]
    mlp_widths: Callable[[dict], tuple[int, ...] | None] = lambda hf_config: None
    """config -> inner width of the MLP of each layer of the pattern, 0 where it has none; None: all have
    ``ffn-hidden-size``."""
    text_config: Callable[[dict], dict] = lambda hf_config: hf_config
    """config -> the config of the language model that Megatron builds, where it stands inside a wrapper's."""
    passthrough_prefixes: tuple[str, ...] = ()
    """What the Hugging Face names of tensors begin with that are no part of the Megatron model and go from import to
    export untouched: layers for multi-token prediction, a vision encoder."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that transformers 5 gives tensors when it saves -> the hub's, which are read and written here."""
    passthrough_tensors: Callable[[dict], list[ParamMapping]] = lambda hf_config: []
    """config -> those of the carried tensors that are known without their file."""

    def layer_kinds(self, hf_config: dict) -> list[str]:
        """The kind of every layer of the pattern, as policies name it."""
        return [LAYER_KINDS[symbol] for symbol in self.layer_pattern(hf_config).replace("|", "")]

    def linear_modules(self, hf_config: dict) -> list[str]:
        """Hugging Face names of every module that a server takes for a linear; what is not quantized of them is
        excluded."""
        fixed = [tensor for tensor in self.all_tensors(hf_config) if tensor.never_quantized]
        return [name.removesuffix(".weight") for tensor in (*self.linears(hf_config), *fixed) for name in tensor.hf]

    def all_tensors(self, hf_config: dict) -> list[ParamMapping]:
        """Every tensor of the Hugging Face model that its config tells of."""
        return [*self.tensors(hf_config), *self.passthrough_tensors(hf_config)]

    def linears(self, hf_config: dict) -> list[ParamMapping]:
        """Every GEMM, in model order, the head last; a tied head is there too, marked ``is_tied``."""
        tensors = self.tensors(hf_config)
        found = [tensor for tensor in tensors if tensor.is_linear]
        if not any(tensor.kind == "head" for tensor in found):
            embedding = next(tensor for tensor in tensors if tensor.kind == "embedding")
            head = ParamMapping(
                "output_layer.weight", ("lm_head.weight",), "head", embedding.shape, is_linear=True, is_tied=True
            )
            found.append(head)
        return found


LAYER_KINDS = {"*": "attention", "M": "mamba", "-": "mlp", "E": "expert"}
"""Symbols of HybridModel's pattern; an expert layer also holds its router and its shared experts."""


def required(hf_config: dict, key: str):
    """A key that the family cannot do without."""
    if hf_config.get(key) is None:
        raise QADError(f"config.json of {hf_config.get('architectures')} has no {key!r}, which is required")
    return hf_config[key]
