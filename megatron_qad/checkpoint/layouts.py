"""Export layouts of an HF checkpoint (bf16, modelopt, compressed-tensors) and the tensors of one linear in each.

Both packed layouts have the same codes and block scales for NVFP4 and FP8; only compressed-tensors has INT4. They
differ in tensor names, in the shape of per-tensor scales, in whether a scale or its reciprocal is stored, and in the
configuration files (``layout_configs``). Properties of a number format are in ``formats.format.StoredLinear``. This
module turns one tensor with an HF name into its stored tensors. Files are written by ``hf_writer``, directories checked
by ``validate``, names defined in ``models``; the caller must already have shared the scales within q/k/v and gate/up.

Sources: modelopt 0.47's exporters; compressed-tensors 0.20, formats nvfp4-pack-quantized, float-quantized and
pack-quantized.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_qad.checkpoint.finite import check_finite
from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format import KVCacheFormat, StoredLinear
from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED, exported_formats

LayoutName = Literal["bf16", "modelopt", "compressed-tensors"]
LAYOUT_NAMES: tuple[LayoutName, ...] = ("bf16", "modelopt", "compressed-tensors")
HEAD = "lm_head"
"""Last part of the name of every family's output layer."""


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a model with its HF name, to be stored."""

    name: str  # HF tensor name, for a linear "<module>.weight"
    tensor: Tensor  # stored tensor, or the float weight [N, K] of a quantized linear
    module: str | None = None  # its linear; required if quantized
    fmt: str = "bf16"  # one of exported_formats(); "bf16" means stored unchanged, whatever its dtype
    weight_scale: Tensor | None = None  # float32 scalar of the weight group, from the format's scale_from_amax
    input_scale: Tensor | None = None  # float32 scalar of the group's input; None if inputs stay in BF16
    is_fake_quantized: bool = True  # True: the weight must pack exactly; False: it is quantized here with scale_rule
    scale_rule: str = "max"  # rule for block scales
    codes: Mapping[str, Tensor] | None = None  # the weight's codes (NumberFormat), if already packed by the caller


@dataclass(frozen=True)
class PackedLayout:
    """An export layout for quantized linears."""

    name: LayoutName
    scalar_shape: tuple[int, ...]  # shape of per-tensor scales

    @property
    def formats(self) -> dict[str, StoredLinear]:
        """Storage of each format that the layout supports, by format name."""
        return {name: fmt.stored[self.name] for name, fmt in FORMATS.items() if self.name in fmt.stored}

    def stored(self, fmt: str) -> StoredLinear:
        """Return how a linear of the format ``fmt`` is stored in this layout."""
        return FORMATS[fmt].stored[self.name]

    def parts(self, fmt: str) -> Mapping[str, tuple[str, str]]:
        """Return the stored tensors of a linear of ``fmt``: role -> (last part of the name, safetensors dtype)."""
        return self.stored(fmt).parts

    def expected(self, fmt: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the stored tensors of a linear [rows, columns] of ``fmt``: last part of the name -> (dtype, shape)."""
        shapes = FORMATS[fmt].weight.shapes(rows, columns)
        return {part: (dtype, shapes.get(role, self.scalar_shape)) for role, (part, dtype) in self.parts(fmt).items()}

    def store_scalar(self, scale: Tensor, *, is_reciprocal: bool = False) -> Tensor:
        """Return a float32 scalar or its reciprocal in the stored shape, ``scalar_shape``."""
        scale = scale.detach().float().cpu().reshape(())
        return (1.0 / scale if is_reciprocal else scale).reshape(self.scalar_shape).clone()


MODELOPT = PackedLayout("modelopt", scalar_shape=())
COMPRESSED_TENSORS = PackedLayout("compressed-tensors", scalar_shape=(1,))
PACKED_LAYOUTS = {layout.name: layout for layout in (MODELOPT, COMPRESSED_TENSORS)}


def stored_tensors(item: HFTensor, layout: LayoutName) -> dict[str, Tensor]:
    """Return the stored CPU tensors of ``item`` by name: one, or up to four for a quantized linear.

    In the layout "bf16" a quantized item is stored as its float values.

    Raises:
        QADError: NaN or Inf values, a missing or invalid scale, a weight that is not [N, K], or a weight that should be
            fake-quantized but is not representable in its format.
    """
    check_layout(layout)
    check_format(item.fmt, layout, item.name)
    check_finite(item.tensor, item.name)
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
    """Return the two KV cache scales of one attention layer, as used in training and without clamping.

    Args:
        k_proj, v_proj: HF names of the two projections.
        k_amax, v_amax: float32, one element each.
    """
    if layout == "bf16":
        return []
    packed_layout, scale_from_amax = PACKED_LAYOUTS[layout], kv_format.number.input_scale_from_amax
    return [
        HFTensor(name, packed_layout.store_scalar(scale_from_amax(amax, name=name)))
        for name, amax in zip(kv_format.scale_names(layout, k_proj, v_proj), (k_amax, v_amax), strict=True)
    ]


def exclusions(linear_modules: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Return the sorted exact names of the linears (including ``lm_head``) that are not quantized.

    Exact names without wildcards are the only form that vLLM, SGLang and TensorRT-LLM interpret equally. The head of a
    language model inside a vision-language model has two names, with its prefix and without: some servers look for one
    and some for the other.

    Raises:
        QADError: a quantized module is not a linear of the model.
    """
    linears, quantized = set(linear_modules), set(quantized)
    unknown = sorted(quantized - linears)
    if unknown:
        raise QADError(
            f"{unknown[0]}: quantized, but not in the list of the model's linears ({len(unknown)} such modules)."
        )
    excluded = linears - quantized
    return sorted(excluded | {HEAD for module in excluded if is_head(module)})


def is_head(module: str) -> bool:
    """Whether a module is the output layer, by its Hugging Face name."""
    return module.rsplit(".", 1)[-1] == HEAD


def check_layout(layout: str) -> None:
    """Raise QADError unless ``layout`` is one of ``LAYOUT_NAMES``."""
    if layout not in LAYOUT_NAMES:
        raise QADError(f"Layout {layout!r} is unknown; expected one of {', '.join(LAYOUT_NAMES)}.")


def check_format(fmt: str, layout: LayoutName, name: str) -> None:
    """Raise QADError, with ``name``, unless linears of the format ``fmt`` can be exported in ``layout``."""
    supported = exported_formats(None if layout == "bf16" else layout)
    if fmt in supported:
        return
    layouts = tuple(FORMATS[fmt].stored) if fmt in FORMATS else ()
    if not layouts:
        raise QADError(f"{name}: format {fmt!r} cannot be exported; expected {', '.join(supported)}.")
    raise QADError(
        f"{name}: {fmt} is exported by --layout {' or '.join(layouts)} only, found --layout {layout}. Choose that "
        "layout, or --layout bf16 to write its weights unpacked."
    )


def _checked_scale(item: HFTensor, role: str) -> Tensor:
    scale = getattr(item, role)
    if scale is None or scale.numel() != 1 or scale.dtype != torch.float32:
        actual = "missing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise QADError(
            f"{item.name}: its {role} is {actual}; a quantized linear needs a float32 scalar. "
            "Calibrate the model before export; with a missing scale servers silently compute garbage."
        )
    value = scale.item()
    if not 0 < value < float("inf"):
        raise QADError(
            f"{item.name}: its {role} is {value}, expected a finite number > 0. Calibrate again on clean data."
        )
    return scale
