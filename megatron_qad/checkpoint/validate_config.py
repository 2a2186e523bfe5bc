"""Check that config.json and hf_quant_config.json match the stored tensors; called by ``validate``.

The exclusions must be exactly the linears that are not quantized, by exact name; both files must agree; and every key
that servers use must have the value of the layout. Informational keys (producer version, observer) are not checked.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_qad.checkpoint.expected_tensors import Inventory
from megatron_qad.checkpoint.hf_directory import AddIssue, read_json
from megatron_qad.checkpoint.layout_configs import ALL_LINEARS, MIXED, hf_quant_config, quantization_config
from megatron_qad.checkpoint.layouts import PackedLayout, is_head
from megatron_qad.formats.format import StoredLinear
from megatron_qad.formats.format_registry import DEFAULT_FORMAT, KV_CACHE_FORMATS


def declared_formats(quantization: dict[str, Any], layout: PackedLayout, model: Inventory) -> dict[str, str]:
    """Return the format of each linear declared in a ``quantization_config``, without undeclared linears.

    Never raises: invalid entries are skipped here and reported by ``check_config``.
    """
    ignored = quantization.get("ignore") if isinstance(quantization.get("ignore"), list) else []
    not_ignored = [module for module in model.linears if module not in ignored]
    if layout.name == "modelopt":
        by_algo = {stored.algo: name for name, stored in layout.formats.items()}
        layers = quantization.get("quantized_layers")
        if quantization.get("quant_algo") == MIXED and isinstance(layers, dict):
            algos = {module: entry.get("quant_algo") for module, entry in layers.items() if isinstance(entry, dict)}
            return {module: by_algo[algo] for module, algo in algos.items() if str(algo) in by_algo}
        algo = str(quantization.get("quant_algo"))
        return dict.fromkeys(not_ignored, by_algo[algo]) if algo in by_algo else {}
    declared: dict[str, str] = {}
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            continue
        fmt = _declared_format(group, layout.formats)
        targets = group.get("targets")
        if fmt is not None and isinstance(targets, list):
            declared |= dict.fromkeys(not_ignored if ALL_LINEARS in targets else map(str, targets), fmt)
    return declared


def _declared_format(group: dict[str, Any], formats: Mapping[str, StoredLinear]) -> str | None:
    """Return the format of a compressed-tensors group: the best match among those with the same number of bits."""
    weights, has_input = group["weights"], bool(group.get("input_activations"))

    def match(name: str) -> tuple[bool, bool]:
        expected = formats[name].group
        return weights.get("type") == expected["weights"]["type"], has_input == bool(expected["input_activations"])

    candidates = [name for name in formats if formats[name].group["weights"]["num_bits"] == weights.get("num_bits")]
    return max(candidates, key=match, default=None)


def check_config(
    directory: Path,
    config: dict[str, Any],
    layout: PackedLayout,
    model: Inventory,
    quantized: Mapping[str, str],
    kv_cache: str,
    issue: AddIssue,
) -> None:
    """Compare config.json (and modelopt's hf_quant_config.json) with the stored tensors.

    Args:
        config: contents of config.json, with a quantization_config of ``layout``.
        quantized: format of each quantized linear.
        kv_cache: one of ``KV_CACHE_FORMATS``, inferred from the stored scales.
        issue: called for every issue.
    """
    actual = config["quantization_config"]
    unquantized = sorted(model.excluded(quantized))
    # A checkpoint without quantized linears is an issue below; it is compared with the default format.
    expected = quantization_config(layout.name, unquantized, quantized or {"": DEFAULT_FORMAT}, kv_cache)
    _check_exclusions("config.json ignore", actual.get("ignore"), model, quantized, issue)
    # Keys that servers use; others (producer, observer) may differ between exporters.
    keys = {"modelopt": ("quant_algo", "quantized_layers"), "compressed-tensors": ("format", "quantization_status")}
    for key in keys[layout.name]:
        if actual.get(key) != expected.get(key):
            issue("config.json", f"quantization_config.{key} is {actual.get(key)!r}, expected {expected.get(key)!r}")
    _check_groups(actual.get("config_groups"), expected["config_groups"], layout, issue)
    if (scheme := actual.get("kv_cache_scheme")) != (expected_scheme := expected.get("kv_cache_scheme")):
        reason = "KV cache scales are stored" if KV_CACHE_FORMATS[kv_cache] else "no k_scale and v_scale are stored"
        issue("config.json", f"kv_cache_scheme is {scheme!r}, expected {expected_scheme!r}: {reason}")
    if not config.get("architectures") or not isinstance(config["architectures"], list):
        issue(
            "config.json",
            f"architectures is {config.get('architectures')!r}; expected a list, servers choose the model class by it",
        )
    if not quantized:
        issue("config.json", "has a quantization_config, but no linear is quantized")
    if layout.name == "modelopt":
        _check_hf_quant_config(directory, actual, model, quantized, kv_cache, issue)


def _check_groups(actual: Any, expected: dict[str, dict[str, Any]], layout: PackedLayout, issue: AddIssue) -> None:
    num_groups = "one group for all linears" if len(expected) == 1 else f"{len(expected)} groups, one per format"
    if not isinstance(actual, dict) or len(actual) != len(expected):
        issue("config.json", f"quantization_config.config_groups is {actual!r:.500}, expected {num_groups}")
        return
    for group, expected_group in zip(actual.values(), expected.values(), strict=True):
        if not isinstance(group, dict):
            issue("config.json", f"quantization_config.config_groups has {group!r}, expected an object")
            return
        _check_group(group, expected_group, layout, issue)


def _check_group(group: dict[str, Any], expected: dict[str, Any], layout: PackedLayout, issue: AddIssue) -> None:
    for key, value in expected.items():
        if not isinstance(value, dict):
            # A loader has defaults for other missing keys, but no target means no linear.
            if group.get(key, None if key == "targets" else value) != value:
                heads = [target for target in value if is_head(target)] if key == "targets" else []
                reason = f": vLLM's output layer is not a Linear, so {heads[0]} is named" if heads else ""
                found = f"config_groups {key} is {group.get(key)!r:.500}"
                issue("config.json", f"{found}, expected {value!r:.500}{reason}")
            continue
        for entry, expected_value in value.items():
            actual = group[key].get(entry) if isinstance(group.get(key), dict) else None
            if entry != "observer" and actual != expected_value:
                issue(
                    "config.json",
                    f"config_groups {key}.{entry} is {actual!r}, expected {expected_value!r} ({layout.name})",
                )


def _check_hf_quant_config(
    directory: Path,
    config_quantization: dict[str, Any],
    model: Inventory,
    quantized: Mapping[str, str],
    kv_cache: str,
    issue: AddIssue,
) -> None:
    name = "hf_quant_config.json"
    content = read_json(directory / name, issue)
    if content is None:
        return
    if not isinstance(content.get("quantization"), dict):
        issue(name, "has no quantization object")
        return
    producer = content.get("producer")
    if not isinstance(producer, dict) or producer.get("name") != "modelopt":
        issue(name, f"producer is {producer!r}, expected the name 'modelopt', by which servers recognize the layout")
    actual = content["quantization"]
    expected = hf_quant_config([], quantized or {"": DEFAULT_FORMAT}, kv_cache)["quantization"]
    for key in expected:
        if key not in actual:
            issue(name, f"has no quantization.{key}; TensorRT-LLM requires the key, null is accepted")
    for key in ("quant_algo", "group_size", "kv_cache_quant_algo", "quantized_layers"):
        if actual.get(key) != expected.get(key):
            issue(name, f"quantization.{key} is {actual.get(key)!r:.500}, expected {expected.get(key)!r:.500}")
        if config_quantization.get(key, expected.get(key)) != actual.get(key):
            in_config = config_quantization.get(key)
            issue(name, f"quantization.{key} is {actual.get(key)!r}, but config.json has {in_config!r}")
    _check_exclusions(f"{name} exclude_modules", actual.get("exclude_modules"), model, quantized, issue)
    if config_quantization.get("ignore") != actual.get("exclude_modules"):
        issue(
            name, "exclude_modules and config.json's ignore differ; expected equal lists, servers read one or the other"
        )


def _check_exclusions(
    location: str, excluded: Any, model: Inventory, quantized: Mapping[str, str], issue: AddIssue
) -> None:
    if not isinstance(excluded, list) or not all(isinstance(entry, str) for entry in excluded):
        issue(location, f"is {excluded!r}, expected a list of module names")
        return
    linears = model.excluded(())
    for module in sorted(set(excluded)):
        if module in quantized:
            issue(module, f"is quantized, but listed in {location}")
        elif module not in linears and not model.is_passthrough(module):
            issue(
                module,
                f"is listed in {location}, but not a linear; expected exact names, servers differ in patterns",
            )
    for module in sorted(model.excluded(quantized) - set(excluded)):
        issue(module, f"is not quantized, but missing from {location}")
