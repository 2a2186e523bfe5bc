"""NVFP4 formats of linears, with and without quantized inputs. The arithmetic is in ``nvfp4``.

Tensor names and configuration entries follow modelopt 0.47's exporters and compressed-tensors 0.20
(nvfp4-pack-quantized).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_qad.formats import nvfp4, nvfp4_fixed, nvfp4_multi_tensor, nvfp4_pack
from megatron_qad.formats.block_scales import SCALE_RULES, scale_rule
from megatron_qad.formats.common import NotRepresentableError
from megatron_qad.formats.format import LinearFormat, NumberFormat, StoredLinear
from megatron_qad.formats.input_scales import MIN_MARGIN, round_up_to_bf16, tie_free, tie_margin
from megatron_qad.formats.nvfp4 import BLOCK_SIZE


class NVFP4Numbers(NumberFormat):
    """NVFP4 numbers: E2M1 in blocks of 16, with E4M3 block scales and one float32 scale per tensor."""

    name = "nvfp4"
    bits = 4.5
    block_size = BLOCK_SIZE
    scale_rules = tuple(SCALE_RULES)
    # The worst block has one value of 6 and fifteen of 5, which round to 4 or 6 (in units of its scale): 0.19. Normally
    # distributed weights have 0.1.
    rounding_error = 0.2
    input_attributes = {
        "num_bits": (2, 1),
        "block_sizes": {-1: BLOCK_SIZE, "type": "dynamic", "scale_bits": (4, 3)},
    }

    scale_from_amax = staticmethod(nvfp4.global_scale_from_amax)
    scales_from_amaxes = staticmethod(nvfp4_multi_tensor.global_scales_from_amaxes)
    fake_quant = staticmethod(nvfp4.fake_quant)
    fake_quant_list_ = staticmethod(nvfp4_multi_tensor.fake_quant_list_)
    block_scales = staticmethod(nvfp4_fixed.block_scales)
    fake_quant_fixed = staticmethod(nvfp4_fixed.fake_quant_fixed)
    saturation_limits = staticmethod(nvfp4_fixed.saturation_limits)

    def quantize_fixed(
        self, x: Tensor, scale: Tensor, block_scales: Tensor, *, name: str = "tensor", check: bool = True
    ) -> dict[str, Tensor]:
        packed = nvfp4_fixed.quantize_fixed(x, scale, block_scales, name=name, check=check)
        return {"weight": packed, "block_scale": block_scales}

    def input_scale_from_amax(self, amax: Tensor, *, name: str = "tensor", check: bool = True) -> Tensor:
        return tie_free(self.scale_from_amax(amax, name=name, check=check)).clamp(max=nvfp4.GLOBAL_SCALE_MAX)

    def calibrated_amax(self, amax: Tensor) -> Tensor:
        """Return ``amax``, or the next bfloat16 number if its scale leaves a bfloat16 input near a rounding boundary.

        No bfloat16 amax does (tested for all). Those of BF16 jobs are bfloat16 numbers, so they stay as they are. Of
        other float32 amaxes 2 % do.
        """
        if tie_margin(self.input_scale_from_amax(amax)) > MIN_MARGIN:
            return amax
        return round_up_to_bf16(amax)

    def quantize(
        self, x: Tensor, scale: Tensor, *, name: str = "tensor", check: bool = True, rule: str = "max"
    ) -> dict[str, Tensor]:
        packed, block_scale = nvfp4.quantize(x, scale, name=name, check=check, rule=rule)
        return {"weight": packed, "block_scale": block_scale}

    def preserves_amax(self, rule: str) -> bool:
        return scale_rule(rule).preserves_amax

    def pack(
        self, weights: Sequence[Tensor], *, name: str, amax: Tensor | None = None, rule: str = "max"
    ) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        scale, codes = super().pack(weights, name=name, amax=amax, rule=rule)
        if codes is None and rule == "four_over_six":
            # Earlier this rule had the global scale of "max". Such checkpoints are exported as they were trained.
            earlier = super().pack(weights, name=name, rule="max")
            return earlier if earlier[1] is not None else (scale, None)
        return scale, codes

    def dequantize(self, codes: Mapping[str, Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
        return nvfp4.dequantize(codes["weight"], codes["block_scale"], scale, dtype)

    def shapes(self, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (rows, columns // 2), "block_scale": (rows, columns // BLOCK_SIZE)}

    def exact_codes(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> dict[str, Tensor] | None:
        try:
            return self.pack_representable(weight, scale, name=name)
        except NotRepresentableError:
            return None

    def pack_representable(self, weight: Tensor, scale: Tensor, *, name: str = "tensor") -> dict[str, Tensor]:
        packed, block_scale = nvfp4_pack.pack_representable(weight, scale, name=name)
        return {"weight": packed, "block_scale": block_scale}


NVFP4 = NVFP4Numbers()

_WEIGHT = {
    "modelopt": {
        "weight": ("weight", "U8"),
        "block_scale": ("weight_scale", "F8_E4M3"),
        "weight_scale": ("weight_scale_2", "F32"),
    },
    "compressed-tensors": {
        "weight": ("weight_packed", "U8"),
        "block_scale": ("weight_scale", "F8_E4M3"),
        "weight_scale": ("weight_global_scale", "F32"),
    },
}
_INPUT = {
    "modelopt": {"input_scale": ("input_scale", "F32")},
    "compressed-tensors": {"input_scale": ("input_global_scale", "F32")},
}
_MODELOPT = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
_COMPRESSED_TENSORS = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": BLOCK_SIZE,
    "symmetric": True,
    # Without this key the loader silently keeps activation block scales in full precision, which changes the logits.
    "scale_dtype": "torch.float8_e4m3fn",
}


def _stored(algo: str, with_input: bool) -> dict[str, StoredLinear]:
    inputs = {**_COMPRESSED_TENSORS, "dynamic": "local", "observer": "static_minmax"} if with_input else None
    parts = {layout: _WEIGHT[layout] | (_INPUT[layout] if with_input else {}) for layout in _WEIGHT}
    name = "nvfp4-pack-quantized"
    return {
        "modelopt": StoredLinear(
            parts=parts["modelopt"],
            algo=algo,
            group={"weights": _MODELOPT} | ({"input_activations": _MODELOPT} if with_input else {}),
            is_known_by_dtype=False,  # other formats use U8 as well
        ),
        "compressed-tensors": StoredLinear(
            parts=parts["compressed-tensors"],
            algo=name,
            group={
                "format": name,
                "input_activations": inputs,
                "output_activations": None,
                "weights": {**_COMPRESSED_TENSORS, "dynamic": False},
            },
            is_reciprocal=True,
            is_known_by_dtype=False,
        ),
    }


NVFP4_W4A4 = LinearFormat(
    "nvfp4", "weights and inputs in NVFP4 (W4A4)", weight=NVFP4, input=NVFP4, stored=_stored("NVFP4", True)
)
NVFP4_W4A16 = LinearFormat(
    "nvfp4-w4a16",
    "weights in NVFP4, inputs unquantized (W4A16)",
    weight=NVFP4,
    stored=_stored("W4A16_NVFP4", False),
)
