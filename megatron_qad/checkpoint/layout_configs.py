"""Quantization configurations of the packed layouts, which tell servers how to load the weights.

``quantization_config`` in config.json for both layouts, and ``hf_quant_config.json`` for modelopt. With one format for
all quantized linears the configuration names that format; with several it is MIXED_PRECISION and lists each linear.

Sources: modelopt 0.47 ``convert_hf_quant_config_format`` and ``process_layer_quant_config``; vLLM 0.33
``ModelOptMixedPrecisionConfig``; compressed-tensors 0.20 ``QuantizationConfig``.
"""

from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_qad.checkpoint.layouts import LayoutName, check_layout, is_head
from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS

ALL_LINEARS = "Linear"
"""Target of a group that matches every linear by its class."""
MIXED = "MIXED_PRECISION"
CT_MIXED = "mixed-precision"


def quantization_config(
    layout: LayoutName, exclude: list[str], formats: Mapping[str, str], kv_cache: str = "bf16"
) -> dict[str, Any]:
    """Return the ``quantization_config`` entry of config.json for a packed layout.

    Args:
        exclude: linears that are not quantized, by exact name.
        formats: format of each quantized linear, by module name.
        kv_cache: one of ``KV_CACHE_FORMATS``.
    """
    check_layout(layout)
    kv_format = KV_CACHE_FORMATS[kv_cache]
    stored_kv = None if kv_format is None or layout == "bf16" else kv_format.stored[layout]
    kv_scheme = None if stored_kv is None else dict(stored_kv.scheme)
    if layout == "modelopt":
        algo = _one_algo(formats)
        config: dict[str, Any] = {
            "config_groups": _config_groups(layout, formats),
            "ignore": exclude,
            "quant_algo": algo,
            "kv_cache_quant_algo": _kv_cache_algo(kv_cache),  # read by servers other than vLLM, which reads the scheme
            "group_size": _group_size(formats),
            "producer": _producer(),
            "quant_method": "modelopt",
        }
        if algo == MIXED:
            config["quantized_layers"] = _quantized_layers(formats)
        if kv_scheme is not None:
            config["kv_cache_scheme"] = kv_scheme
        return config
    if layout == "compressed-tensors":
        kinds = _algos(layout, formats)
        return {
            "config_groups": _config_groups(layout, formats),
            "format": kinds.pop() if len(kinds) == 1 else CT_MIXED,
            "global_compression_ratio": None,
            "ignore": exclude,
            "kv_cache_scheme": kv_scheme,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }
    raise QADError(f"Layout {layout!r} has no quantized tensors and no quantization_config. Use a packed layout.")


def hf_quant_config(exclude: list[str], formats: Mapping[str, str], kv_cache: str = "bf16") -> dict[str, Any]:
    """Return the contents of modelopt's hf_quant_config.json; TensorRT-LLM reads it and requires all keys."""
    algo = _one_algo(formats)
    quantization: dict[str, Any] = {
        "quant_algo": algo,
        "kv_cache_quant_algo": _kv_cache_algo(kv_cache),
        "group_size": _group_size(formats),
        "exclude_modules": exclude,
    }
    if algo == MIXED:
        quantization["quantized_layers"] = _quantized_layers(formats)
    return {"producer": _producer(), "quantization": quantization}


def _one_algo(formats: Mapping[str, str]) -> str:
    algos = _algos("modelopt", formats)
    return algos.pop() if len(algos) == 1 else MIXED


def _algos(layout: LayoutName, formats: Mapping[str, str]) -> set[str]:
    return {FORMATS[fmt].stored[layout].algo for fmt in formats.values()}


def _kv_cache_algo(kv_cache: str) -> str | None:
    kv_format = KV_CACHE_FORMATS[kv_cache]
    return None if kv_format is None else kv_format.stored["modelopt"].algo


def _group_size(formats: Mapping[str, str]) -> int | None:
    """Return the block size of the formats that have blocks; the smallest if they differ (the key has one number)."""
    return min((size for fmt in formats.values() if (size := FORMATS[fmt].block_size) > 1), default=None)


def _config_groups(layout: LayoutName, formats: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {
        f"group_{i}": {**deepcopy(FORMATS[fmt].stored[layout].group), "targets": targets}
        for i, (fmt, targets) in enumerate(_targets(layout, formats).items())
    }


def _targets(layout: LayoutName, formats: Mapping[str, str]) -> dict[str, list[str]]:
    """Return format -> targets of its group: "Linear" for a single format, exact module names otherwise.

    In compressed-tensors a quantized head is named next to "Linear". vLLM builds it as a ``ParallelLMHead``, which the
    target "Linear" does not match; the head would be left unquantized there, and its scales would fail to load.
    """
    by_format: dict[str, list[str]] = {}
    for module, fmt in formats.items():
        by_format.setdefault(fmt, []).append(module)
    if len(by_format) == 1:
        heads = [module for module in sorted(formats) if is_head(module) and layout == "compressed-tensors"]
        return {fmt: [ALL_LINEARS, *heads] for fmt in by_format}
    return {fmt: sorted(by_format[fmt]) for fmt in sorted(by_format)}


def _quantized_layers(formats: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    return {
        module: {"quant_algo": FORMATS[fmt].stored["modelopt"].algo}
        | ({"group_size": size} if (size := FORMATS[fmt].block_size) > 1 else {})
        for module, fmt in sorted(formats.items())
    }


def _producer() -> dict[str, str]:
    # Servers branch on this name and on the modelopt version of the layout.
    try:
        return {"name": "modelopt", "version": version("nvidia-modelopt")}
    except PackageNotFoundError:
        return {"name": "modelopt", "version": "0.47.0"}  # the version whose layout is implemented here
