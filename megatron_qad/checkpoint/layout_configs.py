"""The configurations beside the weights of a packed layout: what each server reads to know how to load them.

``config.json``'s ``quantization_config`` in both layouts, and ``hf_quant_config.json`` in modelopt's. A checkpoint
whose quantized linears all have one format names it; one of several formats is MIXED_PRECISION and lists each linear's.

Sources: modelopt 0.47 ``convert_hf_quant_config_format`` and ``process_layer_quant_config``; vLLM 0.33
``ModelOptMixedPrecisionConfig``; compressed-tensors 0.20 ``QuantizationConfig``.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_qad.checkpoint.layouts import LayoutName, check_layout
from megatron_qad.engine.errors import QADError
from megatron_qad.formats.catalogue import LINEAR_FORMATS
from megatron_qad.formats.nvfp4 import BLOCK_SIZE

QUANT_ALGOS = {"nvfp4": "NVFP4", "nvfp4-w4a16": "W4A16_NVFP4", "fp8": "FP8"}
"""modelopt's name of each format."""
MIXED = "MIXED_PRECISION"
CT_FORMATS = {"nvfp4": "nvfp4-pack-quantized", "nvfp4-w4a16": "nvfp4-pack-quantized", "fp8": "float-quantized"}
CT_MIXED = "mixed-precision"


def quantization_config(
    layout: LayoutName, exclude: list[str], formats: Mapping[str, str], kv_cache: str = "bf16"
) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json for a packed layout.

    Args:
        exclude: linears that are not quantized, by exact name.
        formats: format of each quantized linear, by module name.
        kv_cache: "bf16" or "fp8".
    """
    check_layout(layout)
    if layout == "modelopt":
        algo = _one_algo(formats)
        config: dict[str, Any] = {
            "config_groups": {
                f"group_{i}": {**_modelopt_group(fmt), "targets": targets}
                for i, (fmt, targets) in enumerate(_targets(formats).items())
            },
            "ignore": exclude,
            "quant_algo": algo,
            "kv_cache_quant_algo": "FP8" if kv_cache == "fp8" else None,  # vLLM reads the scheme, others this
            "group_size": _group_size(formats),
            "producer": _producer(),
            "quant_method": "modelopt",
        }
        if algo == MIXED:
            config["quantized_layers"] = _quantized_layers(formats)
        if kv_cache == "fp8":
            config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
        return config
    if layout == "compressed-tensors":
        kinds = {CT_FORMATS[fmt] for fmt in formats.values()}
        return {
            "config_groups": {
                f"group_{i}": {**_compressed_tensors_group(fmt), "targets": targets}
                for i, (fmt, targets) in enumerate(_targets(formats).items())
            },
            "format": kinds.pop() if len(kinds) == 1 else CT_MIXED,
            "global_compression_ratio": None,
            "ignore": exclude,
            "kv_cache_scheme": _CT_KV_SCHEME if kv_cache == "fp8" else None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }
    raise QADError(f"Layout {layout!r} holds no quantized tensors and has no quantization_config.")


def hf_quant_config(exclude: list[str], formats: Mapping[str, str], kv_cache: str = "bf16") -> dict[str, Any]:
    """The contents of modelopt's hf_quant_config.json, which TensorRT-LLM reads; it wants all keys present."""
    algo = _one_algo(formats)
    quantization: dict[str, Any] = {
        "quant_algo": algo,
        "kv_cache_quant_algo": "FP8" if kv_cache == "fp8" else None,
        "group_size": _group_size(formats),
        "exclude_modules": exclude,
    }
    if algo == MIXED:
        quantization["quantized_layers"] = _quantized_layers(formats)
    return {"producer": _producer(), "quantization": quantization}


def _one_algo(formats: Mapping[str, str]) -> str:
    found = {QUANT_ALGOS[fmt] for fmt in formats.values()}
    return found.pop() if len(found) == 1 else MIXED


def _group_size(formats: Mapping[str, str]) -> int | None:
    return BLOCK_SIZE if any(LINEAR_FORMATS[fmt].weight == "nvfp4" for fmt in formats.values()) else None


def _targets(formats: Mapping[str, str]) -> dict[str, list[str]]:
    """Format -> what its group names: every linear if it is the only one, exact names otherwise."""
    by_format: dict[str, list[str]] = {}
    for module, fmt in formats.items():
        by_format.setdefault(fmt, []).append(module)
    if len(by_format) == 1:
        return {fmt: ["Linear"] for fmt in by_format}
    return {fmt: sorted(by_format[fmt]) for fmt in sorted(by_format)}


def _quantized_layers(formats: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {
        module: {"quant_algo": QUANT_ALGOS[fmt]}
        | ({"group_size": BLOCK_SIZE} if LINEAR_FORMATS[fmt].weight == "nvfp4" else {})
        for module, fmt in sorted(formats.items())
    }


def _modelopt_group(fmt: str) -> dict[str, Any]:
    one = {
        "nvfp4": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE},
        "fp8": {"dynamic": False, "num_bits": 8, "type": "float"},
    }
    linear_format = LINEAR_FORMATS[fmt]
    group = {"weights": dict(one[linear_format.weight])}
    if linear_format.input:
        group["input_activations"] = dict(one[linear_format.input])
    return group


_CT_NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": BLOCK_SIZE,
    "symmetric": True,
    # Without it the loader keeps activation block scales in full precision: other logits, and no word about it.
    "scale_dtype": "torch.float8_e4m3fn",
}
_CT_FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_CT_KV_SCHEME = dict(_CT_FP8)


def _compressed_tensors_group(fmt: str) -> dict[str, Any]:
    if fmt == "fp8":
        weights, inputs = dict(_CT_FP8), dict(_CT_FP8)
    else:
        weights = {**_CT_NVFP4, "dynamic": False}
        inputs = {**_CT_NVFP4, "dynamic": "local", "observer": "static_minmax"} if fmt == "nvfp4" else None
    return {"format": CT_FORMATS[fmt], "input_activations": inputs, "output_activations": None, "weights": weights}


def _producer() -> dict[str, str]:
    # Servers branch on the name, and on the version of modelopt whose layout this is.
    try:
        return {"name": "modelopt", "version": version("nvidia-modelopt")}
    except PackageNotFoundError:
        return {"name": "modelopt", "version": "0.47.0"}  # the version whose layout was implemented
