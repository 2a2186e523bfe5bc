"""The layouts of an HF checkpoint on disk: plain, modelopt and compressed-tensors; tensors of one linear in each.

Both packed layouts hold the same codes and block scales. They differ in names, in the shape of the per-tensor scales,
in which of scale and reciprocal is stored, and in the configuration beside the weights (``layout_configs``). What
depends on the number format stands with the format (``formats.format.StoredLinear``). This module turns one tensor in
HF names into what lies on disk. Left out: files (``hf_writer``), checks of a directory (``validate``), names
(``models``), and the sharing of scales within q/k/v and gate/up, which the caller has done.

Sources: modelopt 0.47's exporters; compressed-tensors 0.20, formats nvfp4-pack-quantized and float-quantized.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format import KVCacheFormat, StoredLinear
from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED, exported_formats

LayoutName = Literal["bf16", "modelopt", "compressed-tensors"]
LAYOUT_NAMES: tuple[LayoutName, ...] = ("bf16", "modelopt", "compressed-tensors")


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a model in HF names, on its way to disk."""

    name: str  # HF tensor name, for a linear "<module>.weight"
    tensor: Tensor  # what is stored, or for a quantized linear the float weight [N, K]
    module: str | None = None  # the linear it belongs to; needed for quantized ones
    fmt: str = "bf16"  # one of exported_formats(); "bf16" means stored as it is, whatever its dtype
    weight_scale: Tensor | None = None  # float32 scalar of the weight group, by the format's scale_from_amax
    input_scale: Tensor | None = None  # float32 scalar of the group's input, likewise; None where inputs stay in BF16
    is_fake_quantized: bool = (
        True  # the weight is fake-quantized and packs exactly, or else stops; False rounds a plain weight,
    )
    scale_rule: str = "max"  # then with this rule for block scales
    codes: Mapping[str, Tensor] | None = None  # the weight's codes (NumberFormat), if the caller has packed it already


@dataclass(frozen=True)
class PackedLayout:
    """A layout that holds quantized linears."""

    name: LayoutName
    scalar_shape: tuple[int, ...]  # of per-tensor scales

    @property
    def formats(self) -> dict[str, StoredLinear]:
        """How each format that the layout holds is stored, by the format's name."""
        return {name: fmt.stored[self.name] for name, fmt in FORMATS.items() if self.name in fmt.stored}

    def stored(self, fmt: str) -> StoredLinear:
        """How a linear of the format ``fmt`` is stored here."""
        return FORMATS[fmt].stored[self.name]

    def parts(self, fmt: str) -> Mapping[str, tuple[str, str]]:
        """What a linear of ``fmt`` has on disk: role -> (last part of the name, safetensors dtype)."""
        return self.stored(fmt).parts

    def expected(self, fmt: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a linear [rows, columns] of ``fmt`` has on disk: last part of the name -> safetensors dtype, shape."""
        shapes = FORMATS[fmt].weight.shapes(rows, columns)
        return {part: (dtype, shapes.get(role, self.scalar_shape)) for role, (part, dtype) in self.parts(fmt).items()}

    def store_scalar(self, scale: Tensor, *, is_reciprocal: bool = False) -> Tensor:
        """float32 scalar -> what is stored of it or of its reciprocal: float32 of ``scalar_shape``."""
        scale = scale.detach().float().cpu().reshape(())
        return (1.0 / scale if is_reciprocal else scale).reshape(self.scalar_shape).clone()


MODELOPT = PackedLayout("modelopt", scalar_shape=())
COMPRESSED_TENSORS = PackedLayout("compressed-tensors", scalar_shape=(1,))
PACKED_LAYOUTS = {layout.name: layout for layout in (MODELOPT, COMPRESSED_TENSORS)}


def stored_tensors(item: HFTensor, layout: LayoutName) -> dict[str, Tensor]:
    """The CPU tensors that ``item`` becomes on disk, by name: one, or up to four for a quantized linear.

    In the layout "bf16" a quantized item is stored as its float values. Raises QADError, naming the tensor, for missing
    or unusable scales, a weight that is not [N, K], and a weight that should be on its format's grid and is not.
    """
    check_layout(layout)
    held = exported_formats(None if layout == "bf16" else layout)
    if item.fmt not in held:
        raise QADError(f"{item.name}: format {item.fmt!r} cannot be exported; expected {', '.join(held)}.")
    if item.fmt == UNQUANTIZED.name or layout == "bf16":
        return {item.name: item.tensor.detach().cpu()}
    if item.module is None or item.name != f"{item.module}.weight" or item.tensor.dim() != 2:
        raise QADError(
            f"{item.name}: a quantized tensor must be the 2-D weight of a named linear; found module {item.module!r} "
            f"and shape {list(item.tensor.shape)}. Store it as 'bf16', or name it '<module>.weight'."
        )
    packed_layout = PACKED_LAYOUTS[layout]
    stored, number_format = packed_layout.stored(item.fmt), FORMATS[item.fmt].weight
    weight_scale = _checked_scale(item, "weight_scale")
    if item.codes is not None:
        values = dict(item.codes)
    elif item.is_fake_quantized:
        values = number_format.pack_representable(item.tensor, weight_scale, name=item.name)
    else:
        values = number_format.quantize(item.tensor, weight_scale, name=item.name, rule=item.scale_rule)
    scales = {role: _checked_scale(item, role) for role in ("weight_scale", "input_scale") if role in stored.parts}
    for role, scale in scales.items():
        values[role] = packed_layout.store_scalar(scale, is_reciprocal=stored.is_reciprocal)
    return {f"{item.module}.{stored.parts[role][0]}": value.cpu() for role, value in values.items()}


def kv_scales(
    k_proj: str, v_proj: str, k_amax: Tensor, v_amax: Tensor, layout: LayoutName, kv_format: KVCacheFormat
) -> list[HFTensor]:
    """The KV cache's two scales of one attention layer: what training multiplied with, unclamped.

    Args:
        k_proj, v_proj: HF names of the two projections.
        k_amax, v_amax: float32, one element each.
    """
    if layout == "bf16":
        return []
    packed_layout, scale_from_amax = PACKED_LAYOUTS[layout], kv_format.number.scale_from_amax
    return [
        HFTensor(name, packed_layout.store_scalar(scale_from_amax(amax, name=name)))
        for name, amax in zip(kv_format.scale_names(layout, k_proj, v_proj), (k_amax, v_amax), strict=True)
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
