"""Compares the layers of a model that vLLM has loaded (vllm_load.py) with the export, bit for bit.

vLLM fuses linears: q, k and v; gate and up; all experts of a layer. A fused parameter holds the rows of its parts one
after the other, and one scalar for each part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EXPERTS = {"gate_proj": ("w13_", 0), "up_proj": ("w13_", 1), "down_proj": ("w2_", 0)}
_VOCABULARY = ("embeddings.weight", "embed_tokens.weight", "lm_head.weight")
RENAMED = {
    "backbone.embeddings.": "model.embed_tokens.",
    "backbone.": "model.",
    "language_model.backbone.embeddings.": "language_model.model.embed_tokens.",
    "language_model.backbone.": "language_model.model.",
    "vision_model.radio_model.model.blocks.": "vision_model.model.encoder.layers.",
    "vision_model.radio_model.model.": "vision_model.model.",
}


@dataclass
class Comparison:
    """What was compared, and what differs."""

    export: Mapping[str, Tensor]
    """Tensors of the export, by Hugging Face name."""
    loaded: Mapping[str, Tensor]
    """Parameters of the model, by vLLM's name."""
    compared: set[str] = field(default_factory=set)
    """vLLM's names of the parameters that were compared."""
    different: list[str] = field(default_factory=list)
    """Hugging Face names of tensors that vLLM does not hold as they are."""

    def run(self) -> None:
        for name, tensor in self.export.items():
            if name.endswith((".k_scale", ".v_scale")):
                where = name.rsplit(".", 1)[0].removesuffix(".k_proj").removesuffix(".v_proj")
                self._check(name, self._named(f"{where}.attn.{name[-7:]}"), tensor)
            elif ".experts." in name:
                self._check_expert(name, tensor)
            else:
                self._check_module(name, tensor)

    def _check_expert(self, name: str, tensor: Tensor) -> None:
        layer, rest = name.split(".experts.")
        index, projection, part = rest.split(".")
        which, shard = EXPERTS[projection]
        candidates = [f"{layer}.experts.{which}{part}", f"{layer}.experts.routed_experts.{which}{part}"]
        held = next((found for found in map(self._named, candidates) if found is not None), None)
        if held is not None:
            held = held[int(index)]
            is_gated = f"{layer}.experts.{index}.gate_proj.{part}" in self.export
            held = self._part(held, tensor, shard if is_gated else 0, [tensor] * (2 if is_gated and shard < 2 else 1))
        self._check(name, held, tensor)

    def _check_module(self, name: str, tensor: Tensor) -> None:
        module, _, part = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        for fused, parts in FUSED.items():
            held = self._named(f"{parent}.{fused}.{part}") if projection in parts else None
            if held is not None:
                siblings = [self.export[f"{parent}.{sibling}.{part}"] for sibling in parts]
                return self._check(name, self._part(held, tensor, parts.index(projection), siblings), tensor)
        if part == "A_log":  # vLLM computes A when it loads
            return self._check(name, self._named(f"{module}.A"), -tensor.float().exp())
        held = self._named(name)
        if held is not None and tensor.numel() == 1 and held.unique().numel() == 1:
            held = held.reshape(-1)[0]  # in_proj of Mamba has five parts and one scale
        self._check(name, held, tensor)

    def _part(self, held: Tensor, tensor: Tensor, shard: int, siblings: list[Tensor]) -> Tensor:
        """Return the part of a fused parameter: a scalar, or the rows after those of earlier siblings."""
        if tensor.numel() == 1:
            return held.reshape(-1)[shard if held.numel() > 1 else 0]
        start = sum(len(sibling) for sibling in siblings[:shard])
        return held[start : start + len(tensor)]

    def _named(self, name: str) -> Tensor | None:
        for old, new in RENAMED.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        if name in self.loaded:
            self.compared.add(name)
        return self.loaded.get(name)

    def _check(self, name: str, held: Tensor | None, tensor: Tensor) -> None:
        if held is None:
            return self.different.append(f"{name}: vLLM has no such parameter")
        if held.dim() == tensor.dim() > 0 and len(held) > len(tensor) and name.endswith(_VOCABULARY):
            held = held[: len(tensor)]  # vLLM pads the vocabulary
        is_exact = held.numel() == tensor.numel() and torch.equal(
            _bits(held.to(tensor.dtype)), _bits(tensor.reshape(held.shape))
        )
        is_code = not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1
        if not is_exact or (is_code and held.dtype != tensor.dtype):
            self.different.append(f"{name}: vLLM holds other values, {held.dtype} {list(held.shape)}")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
