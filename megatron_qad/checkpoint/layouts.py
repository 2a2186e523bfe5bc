"""The layouts of an HF checkpoint on disk: plain, modelopt and compressed-tensors; tensors of one linear in each.

Both packed layouts hold the same codes and block scales. They differ in names, in the shape of the per-tensor scales,
in which of scale and reciprocal is stored, and in the configuration beside the weights (``layout_configs``). This
module turns one tensor in HF names into what lies on disk. Left out: files (``hf_writer``), checks of a directory
(``validate``), names (``models``), and the sharing of scales within q/k/v and gate/up, which the caller has done.

Sources: modelopt 0.47's exporters; compressed-tensors 0.20, formats nvfp4-pack-quantized and float-quantized.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import fp8
from megatron_qad.formats.catalogue import LINEAR_FORMATS
from megatron_qad.formats.nvfp4 import quantize
from megatron_qad.formats.nvfp4_pack import pack_on_grid

LayoutName = Literal["bf16", "modelopt", "compressed-tensors"]
LAYOUT_NAMES: tuple[LayoutName, ...] = ("bf16", "modelopt", "compressed-tensors")
EXPORTED_FORMATS = ("bf16", "nvfp4", "nvfp4-w4a16", "fp8")
"""Formats of linears that the packed layouts hold."""


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a model in HF names, on its way to disk."""

    name: str  # HF tensor name, for a linear "<module>.weight"
    tensor: Tensor  # what is stored, or for a quantized linear the float weight [N, K]
    module: str | None = None  # the linear it belongs to; needed for quantized ones
    fmt: str = "bf16"  # one of EXPORTED_FORMATS; "bf16" means stored as it is, whatever its dtype
    weight_scale: Tensor | None = None  # float32 scalar of the weight group: amax / 2688 (NVFP4) or amax / 448 (FP8)
    input_scale: Tensor | None = None  # float32 scalar of the group's input, likewise; None where inputs stay in BF16
    on_grid: bool = True  # the weight is fake-quantized and packs exactly, or else stops; False rounds a plain weight,
    scale_rule: str = "max"  # then with this rule for NVFP4's block scales


@dataclass(frozen=True)
class PackedLayout:
    """How a quantized linear lies on disk: the last parts of its names, and the per-tensor scales' shape and sense."""

    name: LayoutName
    packed: str
    block_scale: str
    global_scale: str
    input_scale: str
    scalar_shape: tuple[int, ...]
    reciprocal: bool  # True: NVFP4's per-tensor scales are stored as 1 / scale
    # FP8 has the same names in both layouts, and scales that multiply.
    fp8_weight: str = "weight"
    fp8_weight_scale: str = "weight_scale"
    fp8_input_scale: str = "input_scale"

    def store_scalar(self, scale: Tensor, fmt: str) -> Tensor:
        """float32 scalar of a linear of ``fmt`` -> what is stored: float32 of ``scalar_shape``."""
        scale = scale.detach().float().cpu().reshape(())
        reciprocal = self.reciprocal and fmt != "fp8"
        return (1.0 / scale if reciprocal else scale).reshape(self.scalar_shape).clone()

    def kv_scale_names(self, k_proj: str, v_proj: str) -> tuple[str, str]:
        """Names of an attention layer's KV cache scales: at the projections, or at the attention itself."""
        if self.name == "modelopt":
            return f"{k_proj}.k_scale", f"{v_proj}.v_scale"
        attention = k_proj.rsplit(".", 1)[0]
        return f"{attention}.k_scale", f"{attention}.v_scale"

    @property
    def nvfp4_only(self) -> set[str]:
        """Last parts of names that only an NVFP4 linear has."""
        return {part for part, _ in self.parts("nvfp4").values()} - {part for part, _ in self.parts("fp8").values()}

    def parts(self, fmt: str) -> dict[str, tuple[str, str]]:
        """What a linear of ``fmt`` has on disk: role -> (last part of the name, safetensors dtype).

        Roles: "weight", "block_scale", "weight_scale", "input_scale"; the scales but for block scales are scalars.
        """
        if fmt == "fp8":
            return {
                "weight": (self.fp8_weight, "F8_E4M3"),
                "weight_scale": (self.fp8_weight_scale, "F32"),
                "input_scale": (self.fp8_input_scale, "F32"),
            }
        found = {
            "weight": (self.packed, "U8"),
            "block_scale": (self.block_scale, "F8_E4M3"),
            "weight_scale": (self.global_scale, "F32"),
        }
        if LINEAR_FORMATS[fmt].input is not None:
            found["input_scale"] = (self.input_scale, "F32")
        return found


MODELOPT = PackedLayout("modelopt", "weight", "weight_scale", "weight_scale_2", "input_scale", (), False)
COMPRESSED_TENSORS = PackedLayout(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", (1,), True
)
PACKED_LAYOUTS = {layout.name: layout for layout in (MODELOPT, COMPRESSED_TENSORS)}


def stored_tensors(item: HFTensor, layout: LayoutName) -> dict[str, Tensor]:
    """The CPU tensors that ``item`` becomes on disk, by name: one, or up to four for a quantized linear.

    In the layout "bf16" a quantized item is stored as its float values. Raises QADError, naming the tensor, for missing
    or unusable scales, a weight that is not [N, K], and a weight that should be on its format's grid and is not.
    """
    check_layout(layout)
    if item.fmt not in EXPORTED_FORMATS:
        raise QADError(f"{item.name}: format {item.fmt!r} cannot be exported; expected {', '.join(EXPORTED_FORMATS)}.")
    if item.fmt == "bf16" or layout == "bf16":
        return {item.name: item.tensor.detach().cpu()}
    if item.module is None or item.name != f"{item.module}.weight" or item.tensor.dim() != 2:
        raise QADError(
            f"{item.name}: a quantized tensor must be the 2-D weight of a named linear; found module {item.module!r} "
            f"and shape {list(item.tensor.shape)}. Store it as 'bf16', or name it '<module>.weight'."
        )
    packed_layout = PACKED_LAYOUTS[layout]
    parts = packed_layout.parts(item.fmt)
    weight_scale = _checked_scale(item, "weight_scale")
    if item.fmt == "fp8":
        pack = fp8.pack_on_grid if item.on_grid else fp8.quantize
        values = {"weight": pack(item.tensor, weight_scale, name=item.name)}
    else:
        pack = pack_on_grid if item.on_grid else partial(quantize, rule=item.scale_rule)
        packed, block_scale = pack(item.tensor, weight_scale, name=item.name)
        values = {"weight": packed, "block_scale": block_scale}
    values["weight_scale"] = packed_layout.store_scalar(weight_scale, item.fmt)
    if "input_scale" in parts:
        values["input_scale"] = packed_layout.store_scalar(_checked_scale(item, "input_scale"), item.fmt)
    return {f"{item.module}.{parts[role][0]}": value.cpu() for role, value in values.items()}


def kv_scales(k_proj: str, v_proj: str, k_amax: Tensor, v_amax: Tensor, layout: LayoutName) -> list[HFTensor]:
    """The FP8 KV cache's two scales of one attention layer, amax / 448: what training multiplied with, unclamped.

    Args:
        k_proj, v_proj: HF names of the two projections.
        k_amax, v_amax: float32, one element each.
    """
    if layout == "bf16":
        return []
    packed_layout = PACKED_LAYOUTS[layout]
    names = packed_layout.kv_scale_names(k_proj, v_proj)
    return [
        HFTensor(name, packed_layout.store_scalar(fp8.scale_from_amax(amax, name=name), "fp8"))
        for name, amax in zip(names, (k_amax, v_amax), strict=True)
    ]


def exclusions(linear_modules: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Sorted exact names of the linears (``lm_head`` included) that are not quantized.

    Exact names, no wildcards: the only form that vLLM, SGLang and TensorRT-LLM read alike. Raises QADError if a
    quantized module is no linear of the model.
    """
    linears, quantized = set(linear_modules), set(quantized)
    unknown = sorted(quantized - linears)
    if unknown:
        raise QADError(
            f"{unknown[0]}: quantized, but not in the list of the model's linears ({len(unknown)} such modules)."
        )
    return sorted(linears - quantized)


def check_layout(layout: str) -> None:
    """Raise QADError unless ``layout`` is one of ``LAYOUT_NAMES``."""
    if layout not in LAYOUT_NAMES:
        raise QADError(f"Layout {layout!r} is unknown; expected one of {', '.join(LAYOUT_NAMES)}.")


def _checked_scale(item: HFTensor, which: str) -> Tensor:
    scale = getattr(item, which)
    if scale is None or scale.numel() != 1 or scale.dtype != torch.float32:
        found = "nothing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise QADError(
            f"{item.name}: its {which} is {found}; a quantized linear needs a float32 scalar. "
            "Calibrate the model before export; servers compute garbage from a missing scale without a word."
        )
    value = scale.item()
    if not 0 < value < float("inf"):
        raise QADError(
            f"{item.name}: its {which} is {value}, expected a finite number > 0. Calibrate again on clean data."
        )
    return scale
