"""What a format is: a ``NumberFormat`` for the arithmetic, a ``LinearFormat`` for what a policy gives a linear.

A number format rounds and packs tensors. A linear format names the number formats of a linear's weight and of its
input, and says how the linear is stored in each export layout. ``format_registry`` lists the linear formats; all other
code asks their objects and compares no names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_qad.formats.common import NotRepresentableError, neighbours, tensor_amax

BF16_BITS = 16
SCALE_BYTES = 4
"""Of a float32 scale of a tensor."""


class NumberFormat:
    """The arithmetic of one format. A subclass sets the fields and implements the first four methods; the methods after
    them are made of these four, and a subclass overrides one only to make it faster.

    ``scale`` is float32 [], one a tensor. ``codes`` are what a tensor [..., K] becomes in memory and a weight [N, K] on
    disk: tensors by role, "weight" and, if blocks have scales of their own, "block_scale".
    """

    name: str
    bits: float
    """Storage of an element with its share of the block scales."""
    block_size: int = 1
    """Elements of a row that share a block scale. The number of columns must be a multiple. 1: no block scales."""
    tensor_bytes: int = SCALE_BYTES
    """Bytes that a stored weight takes besides its elements and block scales: a float32 scale, unless set otherwise."""
    input_attributes: Mapping[Any, Any] | None = None
    """modelopt's quantizer attributes for an input in this format. None: the format is for weights only."""

    # What a format implements.

    def scale_from_amax(self, amax: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
        """Float32 amaxes -> float32 scales, element by element.

        Raises QADError, with ``name``, for a NaN, infinite or negative amax. ``check=False`` leaves that out.
        """
        raise NotImplementedError

    def quantize(
        self, x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
    ) -> dict[str, Tensor]:
        """The codes of ``x`` [..., K]. ``rule`` chooses block scales (``block_scales``), if the format has any.

        Raises QADError, with ``name``, for NaN and Inf. ``check=False`` leaves that out.
        """
        raise NotImplementedError

    def dequantize(self, codes: Mapping[str, Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor [..., K] that codes stand for."""
        raise NotImplementedError

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Role -> shape, of the codes of a weight [rows, columns]."""
        raise NotImplementedError

    # What follows from it.

    def fake_quant(self, x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
        """``dequantize(quantize(x))`` in ``x``'s dtype and shape, without a gradient."""
        return self.dequantize(self.quantize(x.detach(), scale, name=name, check=check), scale, x.dtype)

    def scales_from_amaxes(self, amaxes: Tensor, names: Sequence[str]) -> Tensor:
        """``scale_from_amax`` of n tensors at once: float32 [n] -> float32 [n]."""
        first = int((~amaxes.isfinite()).int().argmax())  # the error, if there is one, names its weight
        return self.scale_from_amax(amaxes, name=names[first])

    @torch.no_grad()
    def fake_quant_list_(
        self, tensors: Sequence[Tensor], scales: Tensor, names: Sequence[str], rule: str = "max"
    ) -> None:
        """Fake-quantize n tensors in place, each under its own scale. scales: float32 [n]."""
        for tensor, scale, name in zip(tensors, scales, names, strict=True):
            codes = self.quantize(tensor, scale, name=name, rule=rule)
            tensor.copy_(self.dequantize(codes, scale, tensor.dtype))

    def exact_codes(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> dict[str, Tensor] | None:
        """The codes that decode to exactly ``weight``, which is then "on the grid"; None if there are none.

        Raises QADError, with ``name``, for NaN and Inf.
        """
        codes = self.quantize(weight, scale, name=name)
        return codes if torch.equal(self.dequantize(codes, scale, weight.dtype), weight) else None

    def pack_representable(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> dict[str, Tensor]:
        """``exact_codes`` of a weight that must have them. Raises NotRepresentableError if there are none."""
        codes = self.exact_codes(weight, scale, name=name)
        if codes is None:
            raise NotRepresentableError(f"{name}: some of its values are no {self.name} values under its scale.")
        return codes

    def is_representable(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> bool:
        return self.exact_codes(weight, scale, name=name) is not None

    def pack(self, weights: Sequence[Tensor], *, name: str) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        """Find the scale that saved weights share, and pack each of them once.

        Args:
            weights: [N, K] each; all tensors that were quantized under one scale (q, k and v; gate and up).
            name: of their group, for errors.

        Returns:
            The scale and the codes of each weight, which decode to exactly it. The codes are None if the weights are
            not on the grid: they were saved between an optimizer step and the next quantization, and the scale is the
            one that quantization would have used.

        Raises QADError for NaN and Inf.
        """
        amax = torch.stack([tensor_amax(weight).cpu() for weight in weights]).amax()
        scale = self.scale_from_amax(amax, name=name)
        # Fake quantization keeps the amax of short types, and with it the scale. It can move a float32 amax by an ulp.
        is_sure = all(weight.dtype != torch.float32 for weight in weights)
        for candidate in [scale] if is_sure else neighbours(scale):
            packed = []
            for weight in weights:
                codes = self.exact_codes(weight, candidate, name=name)
                if codes is None:
                    break
                packed.append(codes)
            else:
                return candidate, packed
        return scale, None

    def rounded(self, weight: Tensor, scale: Tensor, *, name: str, rule: str = "max") -> Tensor:
        """A fake-quantized copy."""
        copy = weight.clone()
        self.fake_quant_list_([copy], scale.reshape(1), [name], rule)
        return copy

    def as_exported(self, weight: Tensor, *, name: str, rule: str = "max") -> Tensor:
        """The values that the export of a saved weight decodes to: the weight itself if it is on the grid, else a
        rounded copy."""
        scale, codes = self.pack([weight], name=name)
        return weight if codes is not None else self.rounded(weight, scale, name=name, rule=rule)


@dataclass(frozen=True)
class StoredLinear:
    """How a quantized linear is stored in one export layout, and what the layout's configuration says about it."""

    parts: Mapping[str, tuple[str, str]]
    """Role -> last part of the tensor's name, and its safetensors dtype. Roles, in the order on disk: "weight",
    "block_scale", "weight_scale", "input_scale". The last two are scalars."""
    algo: str
    """modelopt: ``quant_algo``. compressed-tensors: ``format``."""
    group: Mapping[str, Any]
    """The entry of ``config_groups`` without its targets."""
    is_reciprocal: bool = False
    """Whether the scalars are stored as 1 / scale."""
    is_known_by_dtype: bool = True
    """Whether the dtype of ``<module>.weight`` is enough for the validator to recognise the format. If not, it looks
    for any of the parts."""


@dataclass(frozen=True)
class LinearFormat:
    """What a policy can give a linear."""

    name: str
    """In policies, ``qad.json`` and tables."""
    description: str
    weight: NumberFormat | None = None
    """What the weight is stored and multiplied as. None: left in the job's precision."""
    input: NumberFormat | None = None
    """What the input of the GEMM is rounded to. None: left in the job's precision."""
    stored: Mapping[str, StoredLinear] = field(default_factory=dict)
    """By export layout. A layout that is not here cannot hold the format."""

    @property
    def quantizes(self) -> bool:
        return self.weight is not None or self.input is not None

    @property
    def block_size(self) -> int:
        """The number of columns of the weight must be a multiple of it."""
        return 1 if self.weight is None else self.weight.block_size

    def num_bytes(self, rows: int, columns: int, num_linears: int = 1) -> int:
        """Stored bytes of a weight [rows, columns] and of all scales, of which each of ``num_linears`` has its own."""
        bits = BF16_BITS if self.weight is None else self.weight.bits
        each = (0 if self.weight is None else self.weight.tensor_bytes) + SCALE_BYTES * (self.input is not None)
        return int(rows * columns * bits / 8) + each * num_linears


@dataclass(frozen=True)
class StoredKVCache:
    """The scales of a quantized KV cache in one export layout, and what its configuration says about the cache."""

    scale_names: tuple[str, str]
    """Of keys and values, with the places {k_proj}, {v_proj} and {attention} for names of modules."""
    scheme: Mapping[str, Any]
    """``kv_cache_scheme``."""
    algo: str | None = None
    """``kv_cache_quant_algo``; None where the layout has no such key."""


@dataclass(frozen=True)
class KVCacheFormat:
    """What a policy can give the KV cache. One scale for all keys of an attention layer, one for all values."""

    name: str
    number: NumberFormat
    stored: Mapping[str, StoredKVCache]
    """By export layout."""

    def scale_names(self, layout: str, k_proj: str, v_proj: str) -> tuple[str, str]:
        """Names of an attention layer's two scales, from the Hugging Face names of its projections."""
        places = {"k_proj": k_proj, "v_proj": v_proj, "attention": k_proj.rsplit(".", 1)[0]}
        k_scale, v_scale = (name.format(**places) for name in self.stored[layout].scale_names)
        return k_scale, v_scale
