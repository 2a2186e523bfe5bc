"""The configuration half of ``validate``: do config.json and hf_quant_config.json say what the tensors are?

Exclusions must be exactly the linears that are not quantized, by exact name; both files must agree; and every key that
a server acts on must have the value of the layout. Left out: keys that only inform (producer version, observer).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_qad.checkpoint.hf_directory import AddFault, read_json
from megatron_qad.checkpoint.hf_inventory import Inventory
from megatron_qad.checkpoint.layouts import PackedLayout, hf_quant_config, quantization_config


def check_config(
    directory: Path,
    config: dict[str, Any],
    layout: PackedLayout,
    model: Inventory,
    quantized: Iterable[str],
    fault: AddFault,
) -> None:
    """Compare config.json (and modelopt's hf_quant_config.json) with the linears that are quantized.

    ``config`` has a quantization_config of ``layout``; faults go to ``fault``.
    """
    quantized = frozenset(quantized)
    found = config["quantization_config"]
    unquantized = sorted(set(model.linears) - set(quantized))
    wanted = quantization_config(layout.name, unquantized)
    _check_exclusions("config.json ignore", found.get("ignore"), model, quantized, fault)
    # What a consumer acts on; other keys (producer, observer) may differ between exporters.
    keys = {"modelopt": ("quant_algo",), "compressed-tensors": ("format", "quantization_status")}[layout.name]
    for key in keys:
        if found.get(key) != wanted[key]:
            fault("config.json", f"quantization_config.{key} is {found.get(key)!r}, expected {wanted[key]!r}")
    _check_groups(found.get("config_groups"), wanted["config_groups"]["group_0"], layout, fault)
    if found.get("kv_cache_scheme") is not None:
        fault("config.json", "has a kv_cache_scheme, but no exporter here writes a quantized KV cache; expected null")
    if not config.get("architectures") or not isinstance(config["architectures"], list):
        fault("config.json", f"architectures is {config.get('architectures')!r}; servers choose the model by it")
    if not quantized:
        fault("config.json", "announces NVFP4, but no linear is quantized")
    if layout.name == "modelopt":
        _check_hf_quant_config(directory, found, model, quantized, fault)


def _check_groups(found: Any, wanted: dict[str, Any], layout: PackedLayout, fault: AddFault) -> None:
    if not isinstance(found, dict) or len(found) != 1:
        fault("config.json", f"quantization_config.config_groups is {found!r}, expected one group for all linears")
        return
    group = next(iter(found.values()))
    if not isinstance(group, dict):
        fault("config.json", f"quantization_config.config_groups holds {group!r}, expected an object")
        return
    for key, value in wanted.items():
        if not isinstance(value, dict):
            if value is not None and group.get(key, value) != value:
                fault("config.json", f"config_groups {key} is {group.get(key)!r}, expected {value!r}")
            continue
        for entry, expected in value.items():
            actual = group[key].get(entry) if isinstance(group.get(key), dict) else None
            if entry != "observer" and actual != expected:
                fault(
                    "config.json", f"config_groups {key}.{entry} is {actual!r}, expected {expected!r} ({layout.name})"
                )


def _check_hf_quant_config(
    directory: Path, found: dict[str, Any], model: Inventory, quantized: frozenset[str], fault: AddFault
) -> None:
    name = "hf_quant_config.json"
    other = read_json(directory / name, fault)
    if other is None:
        return
    if not isinstance(other.get("quantization"), dict):
        fault(name, "has no quantization object")
        return
    producer = other.get("producer")
    if not isinstance(producer, dict) or producer.get("name") != "modelopt":
        fault(name, f"producer is {producer!r}, expected one named 'modelopt', by which servers know the layout")
    other = other["quantization"]
    wanted = hf_quant_config([])["quantization"]
    for key in wanted:
        if key not in other:
            fault(name, f"lacks quantization.{key}; TensorRT-LLM wants the key, null is fine")
    for key in ("quant_algo", "group_size", "kv_cache_quant_algo"):
        if other.get(key) != wanted[key]:
            fault(name, f"quantization.{key} is {other.get(key)!r}, expected {wanted[key]!r}")
        if found.get(key, wanted[key]) != other.get(key):
            fault(name, f"quantization.{key} is {other.get(key)!r}, config.json says {found.get(key)!r}")
    _check_exclusions(f"{name} exclude_modules", other.get("exclude_modules"), model, quantized, fault)
    if found.get("ignore") != other.get("exclude_modules"):
        fault(name, "exclude_modules and config.json's ignore differ; servers read one or the other")


def _check_exclusions(where: str, found: Any, model: Inventory, quantized: frozenset[str], fault: AddFault) -> None:
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        fault(where, f"is {found!r}, expected a list of module names")
        return
    for module in sorted(set(found)):
        if module in quantized:
            fault(module, f"is quantized and stands in {where}")
        elif module not in model.linears:
            fault(
                module, f"stands in {where} and is no linear; expected exact names, servers read patterns differently"
            )
    for module in sorted(set(model.linears) - set(quantized) - set(found)):
        fault(module, f"is not quantized and missing from {where}")
