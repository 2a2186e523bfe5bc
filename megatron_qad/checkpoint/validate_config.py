"""The configuration half of ``validate``: do config.json and hf_quant_config.json say what the tensors are?

Exclusions must be exactly the linears that are not quantized, by exact name; both files must agree; and every key that
a server acts on must have the value of the layout. Left out: keys that only inform (producer version, observer).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_qad.checkpoint.expected_tensors import Inventory
from megatron_qad.checkpoint.hf_directory import AddIssue, read_json
from megatron_qad.checkpoint.layout_configs import MIXED, hf_quant_config, quantization_config
from megatron_qad.checkpoint.layouts import PackedLayout
from megatron_qad.formats.format import StoredLinear
from megatron_qad.formats.format_registry import DEFAULT_FORMAT, KV_CACHE_FORMATS


def declared_formats(found: dict[str, Any], layout: PackedLayout, model: Inventory) -> dict[str, str]:
    """Format of each linear as a ``quantization_config`` has it; linears that it does not name are left out.

    Never raises: what is damaged is left out too, and ``check_config`` names it.
    """
    ignored = found.get("ignore") if isinstance(found.get("ignore"), list) else []
    rest = [module for module in model.linears if module not in ignored]
    if layout.name == "modelopt":
        by_algo = {stored.algo: name for name, stored in layout.formats.items()}
        layers = found.get("quantized_layers")
        if found.get("quant_algo") == MIXED and isinstance(layers, dict):
            algos = {module: entry.get("quant_algo") for module, entry in layers.items() if isinstance(entry, dict)}
            return {module: by_algo[algo] for module, algo in algos.items() if str(algo) in by_algo}
        algo = str(found.get("quant_algo"))
        return dict.fromkeys(rest, by_algo[algo]) if algo in by_algo else {}
    declared: dict[str, str] = {}
    groups = found.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            continue
        fmt = _declared_format(group, layout.formats)
        targets = group.get("targets")
        if fmt is not None and isinstance(targets, list):
            declared |= dict.fromkeys(rest if targets == ["Linear"] else map(str, targets), fmt)
    return declared


def _declared_format(group: dict[str, Any], held: Mapping[str, StoredLinear]) -> str | None:
    """The format of a group of compressed-tensors: weights of as many bits, then the one that resembles it most."""
    weights, has_input = group["weights"], bool(group.get("input_activations"))

    def likeness(name: str) -> tuple[bool, bool]:
        wanted = held[name].group
        return weights.get("type") == wanted["weights"]["type"], has_input == bool(wanted["input_activations"])

    alike = [name for name in held if held[name].group["weights"]["num_bits"] == weights.get("num_bits")]
    return max(alike, key=likeness, default=None)


def check_config(
    directory: Path,
    config: dict[str, Any],
    layout: PackedLayout,
    model: Inventory,
    quantized: Mapping[str, str],
    kv_cache: str,
    issue: AddIssue,
) -> None:
    """Compare config.json (and modelopt's hf_quant_config.json) with what is stored.

    Args:
        config: has a quantization_config of ``layout``.
        quantized: format of each quantized linear.
        kv_cache: one of ``KV_CACHE_FORMATS``, by the scales that are stored.
        issue: takes what is wrong.
    """
    found = config["quantization_config"]
    unquantized = sorted(model.excluded(quantized))
    # A checkpoint without a quantized linear is an issue below; compare it with what it would be.
    wanted = quantization_config(layout.name, unquantized, quantized or {"": DEFAULT_FORMAT}, kv_cache)
    _check_exclusions("config.json ignore", found.get("ignore"), model, quantized, issue)
    # What a consumer acts on; other keys (producer, observer) may differ between exporters.
    keys = {"modelopt": ("quant_algo", "quantized_layers"), "compressed-tensors": ("format", "quantization_status")}
    for key in keys[layout.name]:
        if found.get(key) != wanted.get(key):
            issue("config.json", f"quantization_config.{key} is {found.get(key)!r}, expected {wanted.get(key)!r}")
    _check_groups(found.get("config_groups"), wanted["config_groups"], layout, issue)
    if (scheme := found.get("kv_cache_scheme")) != (expected := wanted.get("kv_cache_scheme")):
        why = "KV cache scales are stored" if KV_CACHE_FORMATS[kv_cache] else "no k_scale and v_scale are stored"
        issue("config.json", f"kv_cache_scheme is {scheme!r}, expected {expected!r}: {why}")
    if not config.get("architectures") or not isinstance(config["architectures"], list):
        issue("config.json", f"architectures is {config.get('architectures')!r}; servers choose the model by it")
    if not quantized:
        issue("config.json", "announces NVFP4, but no linear is quantized")
    if layout.name == "modelopt":
        _check_hf_quant_config(directory, found, model, quantized, kv_cache, issue)


def _check_groups(found: Any, wanted: dict[str, dict[str, Any]], layout: PackedLayout, issue: AddIssue) -> None:
    number = "one group for all linears" if len(wanted) == 1 else f"{len(wanted)} groups, one a format"
    if not isinstance(found, dict) or len(found) != len(wanted):
        issue("config.json", f"quantization_config.config_groups is {found!r:.500}, expected {number}")
        return
    for group, expected in zip(found.values(), wanted.values(), strict=True):
        if not isinstance(group, dict):
            issue("config.json", f"quantization_config.config_groups holds {group!r}, expected an object")
            return
        _check_group(group, expected, layout, issue)


def _check_group(group: dict[str, Any], wanted: dict[str, Any], layout: PackedLayout, issue: AddIssue) -> None:
    for key, value in wanted.items():
        if not isinstance(value, dict):
            if value is not None and group.get(key, value) != value:
                issue("config.json", f"config_groups {key} is {group.get(key)!r:.500}, expected {value!r:.500}")
            continue
        for entry, expected in value.items():
            actual = group[key].get(entry) if isinstance(group.get(key), dict) else None
            if entry != "observer" and actual != expected:
                issue(
                    "config.json", f"config_groups {key}.{entry} is {actual!r}, expected {expected!r} ({layout.name})"
                )


def _check_hf_quant_config(
    directory: Path,
    found: dict[str, Any],
    model: Inventory,
    quantized: Mapping[str, str],
    kv_cache: str,
    issue: AddIssue,
) -> None:
    name = "hf_quant_config.json"
    other = read_json(directory / name, issue)
    if other is None:
        return
    if not isinstance(other.get("quantization"), dict):
        issue(name, "has no quantization object")
        return
    producer = other.get("producer")
    if not isinstance(producer, dict) or producer.get("name") != "modelopt":
        issue(name, f"producer is {producer!r}, expected one named 'modelopt', by which servers know the layout")
    other = other["quantization"]
    wanted = hf_quant_config([], quantized or {"": DEFAULT_FORMAT}, kv_cache)["quantization"]
    for key in wanted:
        if key not in other:
            issue(name, f"lacks quantization.{key}; TensorRT-LLM wants the key, null is fine")
    for key in ("quant_algo", "group_size", "kv_cache_quant_algo", "quantized_layers"):
        if other.get(key) != wanted.get(key):
            issue(name, f"quantization.{key} is {other.get(key)!r:.500}, expected {wanted.get(key)!r:.500}")
        if found.get(key, wanted.get(key)) != other.get(key):
            issue(name, f"quantization.{key} is {other.get(key)!r}, config.json says {found.get(key)!r}")
    _check_exclusions(f"{name} exclude_modules", other.get("exclude_modules"), model, quantized, issue)
    if found.get("ignore") != other.get("exclude_modules"):
        issue(name, "exclude_modules and config.json's ignore differ; servers read one or the other")


def _check_exclusions(where: str, found: Any, model: Inventory, quantized: Mapping[str, str], issue: AddIssue) -> None:
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        issue(where, f"is {found!r}, expected a list of module names")
        return
    linears = model.excluded(())
    for module in sorted(set(found)):
        if module in quantized:
            issue(module, f"is quantized and stands in {where}")
        elif module not in linears and not model.is_passthrough(module):
            issue(
                module, f"stands in {where} and is no linear; expected exact names, servers read patterns differently"
            )
    for module in sorted(model.excluded(quantized) - set(found)):
        issue(module, f"is not quantized and missing from {where}")
