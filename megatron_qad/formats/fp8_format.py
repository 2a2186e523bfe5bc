"""FP8 E4M3 formats of linears and the KV cache, with one scale per tensor. The arithmetic is in ``fp8``.

Tensor names and configuration entries follow modelopt 0.47's exporters and compressed-tensors 0.20 (float-quantized).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_qad.formats import fp8
from megatron_qad.formats.common import E4M3_MAX
from megatron_qad.formats.format import KVCacheFormat, LinearFormat, NumberFormat, StoredKVCache, StoredLinear
from megatron_qad.formats.input_scales import round_up_to_bf16


class FP8Numbers(NumberFormat):
    """FP8 E4M3 numbers with one scale per tensor."""

    name = "fp8"
    bits = 8
    rounding_error = 2.0**-4  # half a step of a 3-bit mantissa; normally distributed weights have 0.03
    input_attributes = {"num_bits": (4, 3), "axis": None}

    fake_quant = staticmethod(fp8.fake_quant)

    def scale_from_amax(self, amax: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max") -> Tensor:
        return fp8.scale_from_amax(amax, name=name, check=check)

    def fake_quant_list_(
        self, tensors: Sequence[Tensor], scales: Tensor, names: Sequence[str], rule: str = "max"
    ) -> None:
        for tensor, scale, name in zip(tensors, scales, names, strict=True):
            fp8.fake_quant_(tensor, scale, name=name)

    def quantize(
        self, x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
    ) -> dict[str, Tensor]:
        return {"weight": fp8.quantize(x, scale, name=name, check=check)}

    def dequantize(self, codes: Mapping[str, Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        return fp8.dequantize(codes["weight"], scale, dtype)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (rows, columns)}

    def exact_codes(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> dict[str, Tensor] | None:
        codes = fp8.exact_codes(weight, scale, name=name)
        return None if codes is None else {"weight": codes}

    def pack_representable(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> dict[str, Tensor]:
        return {"weight": fp8.pack_representable(weight, scale, name=name)}


class FP8KVNumbers(FP8Numbers):
    """FP8 numbers of keys and values, whose scales are bfloat16 numbers."""

    name = "fp8_kv"

    def input_scale_from_amax(self, amax: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
        return round_up_to_bf16(self.scale_from_amax(amax, name=name, check=check))


FP8 = FP8Numbers()
FP8_KV = FP8KVNumbers()

_PARTS = {
    "weight": ("weight", "F8_E4M3"),
    "weight_scale": ("weight_scale", "F32"),
    "input_scale": ("input_scale", "F32"),
}
_MODELOPT = {"dynamic": False, "num_bits": 8, "type": "float"}
_COMPRESSED_TENSORS = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}

FP8_W8A8 = LinearFormat(
    "fp8",
    "weights and inputs in FP8 E4M3, one scale a tensor (W8A8)",
    weight=FP8,
    input=FP8,
    stored={
        "modelopt": StoredLinear(
            parts=_PARTS, algo="FP8", group={"weights": _MODELOPT, "input_activations": _MODELOPT}
        ),
        "compressed-tensors": StoredLinear(
            parts=_PARTS,
            algo="float-quantized",
            group={
                "format": "float-quantized",
                "input_activations": _COMPRESSED_TENSORS,
                "output_activations": None,
                "weights": _COMPRESSED_TENSORS,
            },
        ),
    },
)

_KV_STORED = {
    "modelopt": StoredKVCache(
        scale_names=("{k_proj}.k_scale", "{v_proj}.v_scale"),
        scheme=_MODELOPT,  # read by vLLM; other loaders read ``algo``
        algo="FP8",
    ),
    "compressed-tensors": StoredKVCache(
        scale_names=("{attention}.k_scale", "{attention}.v_scale"), scheme=_COMPRESSED_TENSORS
    ),
}

FP8_KV_CACHE = KVCacheFormat("fp8", FP8_KV, _KV_STORED)
# Scale 1, as in modelopt's recipes that end in kv_fp8_cast: keys and values are cast to E4M3.
FP8_CAST_KV_CACHE = KVCacheFormat("fp8_cast", FP8_KV, _KV_STORED, constant_amax=E4M3_MAX)
