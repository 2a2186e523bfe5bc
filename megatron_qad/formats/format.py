"""Base classes of formats: ``NumberFormat`` is the arithmetic, ``LinearFormat`` is what a policy assigns to a linear.

A number format rounds and packs tensors. A linear format combines the number formats of a linear's weight and input
with the way the linear is stored in each export layout. ``format_registry`` lists the linear formats. All other code
uses these objects and never compares format names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.common import NotRepresentableError, neighbours, tensor_amax

BF16_BITS = 16
SCALE_BYTES = 4
"""Size of a tensor's float32 scale in bytes."""


class NumberFormat:
    """The arithmetic of one number format.

    A subclass sets the fields and implements the first four methods. The other methods are built on these four; a
    subclass overrides one of them only to make it faster.

    ``scale`` is float32 [], one per tensor; 1 if the format has none. ``codes`` are the quantized form of a tensor
    [..., K] in memory and of a weight [N, K] on disk: a dictionary of tensors by role. The roles are "weight", if the
    format has block scales "block_scale", and if it stores the shape "shape", int64 [2].
    """

    name: str
    bits: float
    """Bits stored per element, including its share of the block scales."""
    block_size: int = 1
    """Number of elements of a row that share a block scale. It must divide the number of columns. 1 means no block
    scales."""
    tensor_bytes: int = SCALE_BYTES
    """Bytes of a stored weight in addition to its elements and block scales. Default: one float32 scale."""
    scale_rules: tuple[str, ...] = ("max",)
    """Rules that can choose the block scales (``block_scales``). Formats with only "max" have none to choose."""
    rounding_error: float = 0.25
    """Bound of the relative error of a rounded weight, ||rounded - x|| / ||x||, for the validator."""
    input_attributes: Mapping[Any, Any] | None = None
    """modelopt quantizer attributes for an input in this format. None means that the format is for weights only."""

    # A subclass implements these four.

    def scale_from_amax(self, amax: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max") -> Tensor:
        """Return the float32 scale of each float32 amax, for weights whose block scales ``rule`` chooses.

        Raises QADError, with ``name``, for a NaN, infinite or negative amax, unless ``check=False``.
        """
        raise NotImplementedError

    def quantize(
        self, x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
    ) -> dict[str, Tensor]:
        """Return the codes of ``x`` [..., K]. ``rule`` chooses the block scales (``block_scales``), if there are any.

        Raises QADError, with ``name``, for NaN and Inf, unless ``check=False``.
        """
        raise NotImplementedError

    def dequantize(self, codes: Mapping[str, Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode codes to a tensor [..., K] of ``dtype``."""
        raise NotImplementedError

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes, by role, of the codes of a weight [rows, columns]."""
        raise NotImplementedError

    # The following methods are built on the four above.

    def fake_quant(self, x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
        """Fake-quantize ``x``: ``dequantize(quantize(x))`` in ``x``'s dtype and shape, without a gradient."""
        return self.dequantize(self.quantize(x.detach(), scale, name=name, check=check), scale, x.dtype)

    def input_scale_from_amax(self, amax: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
        """Return the scale of an input with this amax. Arguments and errors are those of ``scale_from_amax``."""
        return self.scale_from_amax(amax, name=name, check=check)

    def calibrated_amax(self, amax: Tensor) -> Tensor:
        """Return the amax to keep after a calibration that found ``amax``, float32 []: the same or a larger one."""
        return amax

    def scales_from_amaxes(self, amaxes: Tensor, names: Sequence[str], rule: str = "max") -> Tensor:
        """Return the scales of n tensors, float32 [n], from their amaxes, float32 [n]."""
        first = int((~amaxes.isfinite()).int().argmax())  # names the weight if there is an error
        return self.scale_from_amax(amaxes, name=names[first], rule=rule)

    def block_scales(
        self,
        x: Tensor,
        scale: Tensor,
        *,
        name: str = "tensor",
        rule: str = "max",
        amax: Tensor | None = None,
        hessian: Tensor | None = None,
    ) -> Tensor | None:
        """Return the block scales that ``rule`` chooses for ``x`` [..., K], or None if the format has none to choose.

        The arguments are those of ``nvfp4_fixed.block_scales``.
        """
        return None

    def fake_quant_fixed(
        self, x: Tensor, scale: Tensor, block_scales: Tensor | None, *, name: str = "tensor", check: bool = True
    ) -> Tensor:
        """Fake-quantize ``x`` with block scales from ``block_scales``. Values beyond the largest code saturate."""
        return self.fake_quant(x, scale, name=name, check=check)

    def quantize_fixed(
        self, x: Tensor, scale: Tensor, block_scales: Tensor | None, *, name: str = "tensor", check: bool = True
    ) -> dict[str, Tensor]:
        """Return the codes of ``x`` with block scales from ``block_scales``; they decode to ``fake_quant_fixed``."""
        return self.quantize(x, scale, name=name, check=check)

    def saturation_limits(self, scale: Tensor, block_scales: Tensor) -> Tensor:
        """Return the largest magnitude that each block can hold, float32 of the shape of ``block_scales``.

        Only formats whose ``block_scales`` are not None have it; see ``nvfp4_fixed.saturation_limits``.
        """
        raise NotImplementedError

    def preserves_amax(self, rule: str) -> bool:
        """Whether fake quantization under ``rule`` preserves the amax, so that ``pack`` can find the scale again.

        In 16-bit dtypes the amax is the same, in float32 within an ulp.
        """
        return True

    @torch.no_grad()
    def fake_quant_list_(
        self, tensors: Sequence[Tensor], scales: Tensor, names: Sequence[str], rule: str = "max"
    ) -> None:
        """Fake-quantize n tensors in place, each with its own scale. ``scales`` is float32 [n]."""
        for tensor, scale, name in zip(tensors, scales, names, strict=True):
            codes = self.quantize(tensor, scale, name=name, rule=rule)
            tensor.copy_(self.dequantize(codes, scale, tensor.dtype))

    def exact_codes(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> dict[str, Tensor] | None:
        """Return the codes that decode to exactly ``weight``, or None if the format cannot represent it.

        Raises QADError, with ``name``, for NaN and Inf.
        """
        codes = self.quantize(weight, scale, name=name)
        return codes if torch.equal(self.dequantize(codes, scale, weight.dtype), weight) else None

    def pack_representable(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> dict[str, Tensor]:
        """Return ``exact_codes``. Raises NotRepresentableError if there are none."""
        codes = self.exact_codes(weight, scale, name=name)
        if codes is None:
            raise NotRepresentableError(f"{name}: some values are not representable in {self.name} under its scale.")
        return codes

    def is_representable(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> bool:
        return self.exact_codes(weight, scale, name=name) is not None

    def pack(
        self, weights: Sequence[Tensor], *, name: str, amax: Tensor | None = None, rule: str = "max"
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        """Pack weights that share a scale, after recovering it.

        Args:
            weights: [N, K] each, all tensors that were quantized with one scale (q, k and v; gate and up).
            name: name of their group for errors.
            amax: float32 [], the amax before quantization, from which the scale was computed. None: recover it from the
                weights.
            rule: rule that chose their block scales.

        Returns:
            The scale, and the codes that decode to exactly each weight. The codes are None if the format cannot
            represent the weights, because they were saved between an optimizer step and the next quantization. The
            scale is then the one which that quantization would have used.

        Raises QADError for NaN and Inf, and without ``amax`` for a rule that does not preserve it.
        """
        if amax is None and not self.preserves_amax(rule):
            raise QADError(
                f"{name}: its amax is missing. Block scales of the rule {rule} do not preserve the amax, so the global "
                "scale cannot be found from the quantized weight. Store the amax with the weight."
            )
        found = torch.stack([tensor_amax(weight).cpu() for weight in weights]).amax()
        scale = self.scale_from_amax(found if amax is None else amax.cpu(), name=name, rule=rule)
        # A float32 amax can change by an ulp.
        is_sure = amax is not None or all(weight.dtype != torch.float32 for weight in weights)
        for candidate in [scale] if is_sure else neighbours(scale):
            if (codes := self._pack_with(candidate, weights, name)) is not None:
                return candidate, codes
        return self.scale_from_amax(found, name=name, rule=rule), None

    def _pack_with(self, scale: Tensor, weights: Sequence[Tensor], name: str) -> list[dict[str, Tensor]] | None:
        """Return the exact codes of each weight; None at the first weight that has none."""
        packed = []
        for weight in weights:
            if (codes := self.exact_codes(weight, scale, name=name)) is None:
                return None
            packed.append(codes)
        return packed

    def rounded(self, weight: Tensor, scale: Tensor, *, name: str, rule: str = "max") -> Tensor:
        """Return a fake-quantized copy of ``weight``."""
        copy = weight.clone()
        self.fake_quant_list_([copy], scale.reshape(1), [name], rule)
        return copy

    def as_exported(self, weight: Tensor, *, name: str, amax: Tensor | None = None, rule: str = "max") -> Tensor:
        """Return the values that the exported weight decodes to: ``weight`` itself if representable, else a rounded
        copy. Arguments and errors are those of ``pack``."""
        scale, codes = self.pack([weight], name=name, amax=amax, rule=rule)
        return weight if codes is not None else self.rounded(weight, scale, name=name, rule=rule)


@dataclass(frozen=True)
class StoredLinear:
    """Tensors and configuration entries of a quantized linear in one export layout."""

    parts: Mapping[str, tuple[str, str]]
    """Role -> (last part of the tensor's name, its safetensors dtype). The roles, in the order on disk, are "weight",
    "block_scale", "shape", "weight_scale" and "input_scale". The last two are scalars."""
    algo: str
    """Algorithm name in the configuration: ``quant_algo`` in modelopt, ``format`` in compressed-tensors."""
    group: Mapping[str, Any]
    """Entry of ``config_groups`` in the configuration, without its targets."""
    is_reciprocal: bool = False
    """Whether the scalars are stored as 1 / scale."""
    is_known_by_dtype: bool = True
    """Whether the validator can recognize the format from the dtype of ``<module>.weight`` alone. If not, it looks for
    any of the parts."""


@dataclass(frozen=True)
class LinearFormat:
    """A format that a policy can assign to a linear."""

    name: str
    """Name of the format in policies, ``qad.json`` and tables."""
    description: str
    weight: NumberFormat | None = None
    """Number format of the weight. None means the job's precision."""
    input: NumberFormat | None = None
    """Number format of the GEMM's input. None means the job's precision."""
    stored: Mapping[str, StoredLinear] = field(default_factory=dict)
    """Storage by export layout. A layout that is missing here does not support the format."""

    @property
    def quantizes(self) -> bool:
        return self.weight is not None or self.input is not None

    @property
    def block_size(self) -> int:
        """Block size of the weight's format, which must divide the number of columns of the weight."""
        return 1 if self.weight is None else self.weight.block_size

    def num_bytes(self, rows: int, columns: int, num_linears: int = 1) -> int:
        """Return the stored bytes of a weight [rows, columns] and the scales of each of its ``num_linears`` linears."""
        bits = BF16_BITS if self.weight is None else self.weight.bits
        each = (0 if self.weight is None else self.weight.tensor_bytes) + SCALE_BYTES * (self.input is not None)
        return int(rows * columns * bits / 8) + each * num_linears


def check_columns(name: str, columns: int, fmt: NumberFormat | LinearFormat) -> None:
    """Raise QADError unless a weight's shard ``name`` with this number of columns consists of complete blocks."""
    if columns % fmt.block_size:
        raise QADError(
            f"{name}: its shard has {columns} columns; {fmt.name} needs a multiple of {fmt.block_size}. Choose a "
            "smaller tensor-parallel size, or another format for this layer."
        )


@dataclass(frozen=True)
class StoredKVCache:
    """Scales and configuration entries of a quantized KV cache in one export layout."""

    scale_names: tuple[str, str]
    """Names of the key and value scales, with the placeholders {k_proj}, {v_proj} and {attention} for module names."""
    scheme: Mapping[str, Any]
    """Value of ``kv_cache_scheme`` in the configuration."""
    algo: str | None = None
    """Value of ``kv_cache_quant_algo`` in the configuration. None means that the layout has no such key."""


@dataclass(frozen=True)
class KVCacheFormat:
    """A format that a policy can assign to the KV cache, with one key scale and one value scale per attention layer."""

    name: str
    number: NumberFormat
    """Number format of keys and values. Their scale is its ``input_scale_from_amax``."""
    stored: Mapping[str, StoredKVCache]
    """Storage by export layout."""
    constant_amax: float | None = None
    """Amax of all keys and values, without calibration. None means that it is calibrated."""

    def scale_names(self, layout: str, k_proj: str, v_proj: str) -> tuple[str, str]:
        """Return the names of a layer's key and value scales, from the Hugging Face names of its projections."""
        places = {"k_proj": k_proj, "v_proj": v_proj, "attention": k_proj.rsplit(".", 1)[0]}
        k_scale, v_scale = (name.format(**places) for name in self.stored[layout].scale_names)
        return k_scale, v_scale
