"""The layouts of an HF checkpoint on disk: plain, modelopt NVFP4 and compressed-tensors NVFP4.

Both NVFP4 layouts hold the same codes and block scales. They differ in names, in the shape of the per-tensor scales,
in which of scale and reciprocal is stored, and in the configuration beside the weights. This module turns one tensor
in HF names into what lies on disk and writes the configurations. Left out: files (``hf_writer``), checks of a
directory (``validate``), names (``models``), and the sharing of scales within q/k/v and gate/up, which the caller has
done.

Sources: modelopt 0.47 ``convert_hf_quant_config_format``; compressed-tensors 0.20 preset ``NVFP4``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_qad.formats.nvfp4 import BLOCK_SIZE, quantize
from megatron_qad.formats.nvfp4_pack import pack_on_grid
from megatron_qad.runtime.errors import QADError

LayoutName = Literal["bf16", "modelopt", "compressed-tensors"]
LAYOUT_NAMES: tuple[LayoutName, ...] = ("bf16", "modelopt", "compressed-tensors")


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a model in HF names, on its way to disk."""

    name: str  # HF tensor name, for a linear "<module>.weight"
    tensor: Tensor  # what is stored, or for nvfp4 the float weight [N, K]
    module: str | None = None  # the linear it belongs to; needed for nvfp4
    fmt: Literal["bf16", "nvfp4"] = "bf16"  # "bf16" means stored as it is, whatever its dtype
    global_scale: Tensor | None = None  # nvfp4: float32 scalar, amax(weight group) / 2688
    input_scale: Tensor | None = None  # nvfp4: float32 scalar, amax(input of the group) / 2688
    on_grid: bool = (
        True  # nvfp4: tensor is fake-quantized and packs exactly, or else stops; False rounds a plain weight
    )


@dataclass(frozen=True)
class PackedLayout:
    """How an NVFP4 linear lies on disk: the last part of each of its four names, and the per-tensor scales' shape and
    sense."""

    name: LayoutName
    packed: str
    block_scale: str
    global_scale: str
    input_scale: str
    scalar_shape: tuple[int, ...]
    reciprocal: bool  # True: per-tensor scales are stored as 1 / scale

    def store_scalar(self, scale: Tensor) -> Tensor:
        """float32 scalar -> what is stored: float32 of ``scalar_shape``."""
        scale = scale.detach().float().cpu().reshape(())
        return (1.0 / scale if self.reciprocal else scale).reshape(self.scalar_shape).clone()

    @property
    def companions(self) -> tuple[str, str, str]:
        return self.block_scale, self.global_scale, self.input_scale


MODELOPT = PackedLayout("modelopt", "weight", "weight_scale", "weight_scale_2", "input_scale", (), False)
COMPRESSED_TENSORS = PackedLayout(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", (1,), True
)
PACKED_LAYOUTS = {layout.name: layout for layout in (MODELOPT, COMPRESSED_TENSORS)}


def stored_tensors(item: HFTensor, layout: LayoutName) -> dict[str, Tensor]:
    """The CPU tensors that ``item`` becomes on disk, by name: one, or four for an NVFP4 linear in a packed layout.

    In the layout "bf16" an NVFP4 item is stored as its float values. Raises QADError, naming the tensor, for missing or
    unusable scales, a weight that is not [N, K], and a weight that should be on the NVFP4 grid and is not.
    """
    check_layout(layout)
    if item.fmt not in ("bf16", "nvfp4"):
        raise QADError(f"{item.name}: format {item.fmt!r} is unknown; expected 'bf16' or 'nvfp4'.")
    if item.fmt == "bf16" or layout == "bf16":
        return {item.name: item.tensor.detach().cpu()}
    packed_layout = PACKED_LAYOUTS[layout]
    if item.module is None or item.name != f"{item.module}.weight" or item.tensor.dim() != 2:
        raise QADError(
            f"{item.name}: an NVFP4 tensor must be the 2-D weight of a named linear; found module {item.module!r} "
            f"and shape {list(item.tensor.shape)}. Store it as 'bf16', or name it '<module>.weight'."
        )
    global_scale = _checked_scale(item, "global_scale")
    input_scale = _checked_scale(item, "input_scale")
    pack = pack_on_grid if item.on_grid else quantize
    packed, block_scale = pack(item.tensor, global_scale, name=item.name)
    return {
        f"{item.module}.{packed_layout.packed}": packed.cpu(),
        f"{item.module}.{packed_layout.block_scale}": block_scale.cpu(),
        f"{item.module}.{packed_layout.global_scale}": packed_layout.store_scalar(global_scale),
        f"{item.module}.{packed_layout.input_scale}": packed_layout.store_scalar(input_scale),
    }


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


def quantization_config(layout: LayoutName, exclude: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json for a packed layout."""
    check_layout(layout)
    if layout == "modelopt":
        group = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
        return {
            "config_groups": {"group_0": {"input_activations": dict(group), "weights": group, "targets": ["Linear"]}},
            "ignore": exclude,
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK_SIZE,
            "producer": _producer(),
            "quant_method": "modelopt",
        }
    if layout == "compressed-tensors":
        common = {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": BLOCK_SIZE,
            "symmetric": True,
            # Without it the loader keeps activation block scales in full precision: other logits, and no word about it.
            "scale_dtype": "torch.float8_e4m3fn",
        }
        return {
            "config_groups": {
                "group_0": {
                    "format": "nvfp4-pack-quantized",
                    "input_activations": {**common, "dynamic": "local", "observer": "static_minmax"},
                    "output_activations": None,
                    "targets": ["Linear"],
                    "weights": {**common, "dynamic": False},
                }
            },
            "format": "nvfp4-pack-quantized",
            "global_compression_ratio": None,
            "ignore": exclude,
            "kv_cache_scheme": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }
    raise QADError(f"Layout {layout!r} holds no quantized tensors and has no quantization_config.")


def hf_quant_config(exclude: list[str]) -> dict[str, Any]:
    """The contents of modelopt's hf_quant_config.json, which TensorRT-LLM reads; it wants all keys present."""
    return {
        "producer": _producer(),
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": BLOCK_SIZE,
            "exclude_modules": exclude,
        },
    }


def check_layout(layout: str) -> None:
    """Raise QADError unless ``layout`` is one of ``LAYOUT_NAMES``."""
    if layout not in LAYOUT_NAMES:
        raise QADError(f"Layout {layout!r} is unknown; expected one of {', '.join(LAYOUT_NAMES)}.")


def _checked_scale(item: HFTensor, which: str) -> Tensor:
    scale = getattr(item, which)
    if scale is None or scale.numel() != 1 or scale.dtype != torch.float32:
        found = "nothing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise QADError(
            f"{item.name}: its {which} is {found}; an NVFP4 linear needs a float32 scalar. "
            "Calibrate the model before export; servers compute garbage from a missing scale without a word."
        )
    value = scale.item()
    if not 0 < value < float("inf"):
        raise QADError(
            f"{item.name}: its {which} is {value}, expected a finite number > 0. Calibrate again on clean data."
        )
    return scale


def _producer() -> dict[str, str]:
    # Servers branch on the name, and on the version of modelopt whose layout this is.
    try:
        return {"name": "modelopt", "version": version("nvidia-modelopt")}
    except PackageNotFoundError:
        return {"name": "modelopt", "version": "0.47.0"}  # the version whose layout was implemented
