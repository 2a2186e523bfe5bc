"""INT4 weights in groups of 128 with BF16 scales (W4A16). The arithmetic is in ``int4``.

Source of names and entries: compressed-tensors 0.20, format pack-quantized. modelopt's Hugging Face layout has no plain
INT4 weights (its W4A16_AWQ also scales inputs), so the layout "modelopt" cannot hold this format.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import int4
from megatron_qad.formats.format import LinearFormat, NumberFormat, StoredLinear


class INT4Numbers(NumberFormat):
    """Every group has its own scale, so the per-tensor ``scale`` that all formats receive is 1 and has no effect.

    Codes: "weight" int32 [N, K / 8], "block_scale" bfloat16 [N, K / 128], "shape" int64 [2] with N and K.
    """

    name = "int4"
    bits = 4 + 16 / int4.GROUP_SIZE
    block_size = int4.GROUP_SIZE
    tensor_bytes = 16  # the shape
    rounding_error = 0.35  # for a largest value of 8 standard deviations in each group; normal weights have 0.12

    def scale_from_amax(self, amax: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max") -> Tensor:
        if check and not bool((amax.isfinite() & (amax >= 0)).all()):
            raise QADError(f"{name}: amax is {amax.max().item()}, expected a finite number >= 0. Check the weight.")
        return torch.ones_like(amax, dtype=torch.float32)

    def quantize(
        self, x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
    ) -> dict[str, Tensor]:
        return self._stored(x, *int4.quantize(x, name=name, check=check))

    def dequantize(self, codes: Mapping[str, Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        return int4.dequantize(int4.unpack_codes(codes["weight"]), codes["block_scale"], dtype)

    def fake_quant(self, x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
        return int4.fake_quant_(x.detach().clone(), name=name, check=check)

    @torch.no_grad()
    def fake_quant_list_(
        self, tensors: Sequence[Tensor], scales: Tensor, names: Sequence[str], rule: str = "max"
    ) -> None:
        for tensor, name in zip(tensors, names, strict=True):
            int4.fake_quant_(tensor, name=name)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (rows, columns // 8), "block_scale": (rows, columns // int4.GROUP_SIZE), "shape": (2,)}

    def exact_codes(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> dict[str, Tensor] | None:
        found = int4.exact_codes(weight, name=name)
        return None if found is None else self._stored(weight, *found)

    def pack(
        self, weights: Sequence[Tensor], *, name: str, amax: Tensor | None = None, rule: str = "max"
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        scale = torch.ones((), dtype=torch.float32)  # no per-tensor scale, so no neighbours to try
        return scale, self._pack_with(scale, weights, name)

    @staticmethod
    def _stored(x: Tensor, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
        shape = torch.tensor(x.shape, dtype=torch.int64)
        return {"weight": int4.pack_codes(codes), "block_scale": scales, "shape": shape}


INT4 = INT4Numbers()

INT4_W4A16 = LinearFormat(
    "int4-w4a16",
    "weights in INT4, one BF16 scale per 128 elements; inputs in BF16",
    weight=INT4,
    stored={
        "compressed-tensors": StoredLinear(
            parts={
                "weight": ("weight_packed", "I32"),
                "block_scale": ("weight_scale", "BF16"),
                "shape": ("weight_shape", "I64"),
            },
            algo="pack-quantized",
            group={
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": int4.GROUP_SIZE,
                    "dynamic": False,
                },
            },
            is_known_by_dtype=False,
        ),
    },
)
