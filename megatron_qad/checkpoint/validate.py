"""Validate an exported quantized directory, as strictly as the strictest server, and report every issue.

Needs no model and no GPU. The expected tensors come from config.json (``expected_tensors``), the stored tensors from
the shard headers (``hf_directory``); ``validate_config`` checks the configurations and ``validate_values`` the scales.
This covers damage that servers accept silently: a missing scale, block scales stored as U8, scales that differ within a
fused group, exclusions that do not match. ``validate_sums`` finds files that were changed, ``calibration_record``
checks the scales of inputs, and ``validate_against`` compares the content with the model that training began from.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_qad.checkpoint.calibration_record import check_input_scales
from megatron_qad.checkpoint.expected_tensors import Inventory, inventory
from megatron_qad.checkpoint.hf_directory import Shards, read_json, read_shards
from megatron_qad.checkpoint.layouts import PACKED_LAYOUTS, PackedLayout
from megatron_qad.checkpoint.validate_against import Original
from megatron_qad.checkpoint.validate_config import check_config, declared_formats
from megatron_qad.checkpoint.validate_sums import check_sums
from megatron_qad.checkpoint.validate_values import check_values
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.plural import count
from megatron_qad.engine.run_directory.run_files import CALIBRATION_FILE
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS, UNQUANTIZED

_PLAIN_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class ValidationIssue:
    """One issue of a checkpoint: name of the tensor, module or file, and the value found and the value expected."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


@dataclass
class ValidationResult:
    """Result of a validation; the checkpoint is valid if ``issues`` is empty."""

    directory: Path
    layout: str = "unknown"
    num_tensors: int = 0
    num_bytes: int = 0
    quantized: dict[str, str] = field(default_factory=dict)
    """Format of each quantized linear, by module name."""
    kv_cache: str = UNQUANTIZED.name
    num_linears: int = 0
    issues: list[ValidationIssue] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What could not be checked."""

    def add(self, name: str, text: str) -> None:
        """Add an issue."""
        self.issues.append(ValidationIssue(name, text))

    def summary(self) -> str:
        """Return a summary in one line."""
        verdict = count(len(self.issues), "issue") if self.issues else "valid"
        return (
            f"{self.directory}: {verdict}; layout {self.layout}, {count(self.num_tensors, 'tensor')}, "
            f"{len(self.quantized)} of {count(self.num_linears, 'linear')} quantized ({self._formats()}), "
            f"{count(self.num_bytes, 'byte')}"
        )

    def _formats(self) -> str:
        counts = Counter(self.quantized.values())
        return ", ".join([*(f"{n} {fmt}" for fmt, n in sorted(counts.items())), f"KV cache {self.kv_cache}"])


def validate_nvfp4(
    directory: str | Path, *, against: str | Path | None = None, with_sums: bool = True
) -> ValidationResult:
    """Validate the quantized HF checkpoint ``directory`` in the modelopt or the compressed-tensors layout.

    Does not raise for a damaged or invalid checkpoint; every issue is in the result.

    Args:
        against: Hugging Face directory of the unquantized model that training began from, with which weights,
            configuration and tokenizer are compared.
        with_sums: whether to compare every file with its SHA-256 at the time of the export.

    Raises:
        QADError: ``against`` is not such a model.

    Example::

        result = validate_nvfp4("exports/qad-nvfp4")
        print(result.summary())
        assert not result.issues, result.issues[0]
    """
    result = ValidationResult(Path(directory))
    original = None if against is None else Original.open(Path(against), result.directory)
    if not result.directory.is_dir():
        result.add(str(directory), "is not a directory; expected an exported checkpoint")
        return result
    if (result.directory / "hf" / "config.json").is_file():
        result.add(str(directory), "is a Megatron checkpoint; expected an exported one (megatron-qad export)")
        return result
    if with_sums:
        check_sums(result.directory, result.add)
    config = read_json(result.directory / "config.json", result.add)
    shards = read_shards(result.directory, result.add)
    result.num_tensors, result.num_bytes = len(shards.tensors), shards.num_bytes
    if config is None:
        return result
    layout = _find_layout(config, result)
    try:
        model = inventory(config)
    except QADError as error:
        result.add("config.json", str(error))
        return result
    result.num_linears = len(model.linears)
    model.never_quantized += _passthrough_linears(model, shards)
    if layout is None:
        return result
    declared = declared_formats(config["quantization_config"], layout, model)
    stored = {module: _stored_format(module, layout, declared.get(module), shards) for module in model.linears}
    result.quantized = {module: fmt for module, fmt in stored.items() if fmt is not None}
    result.kv_cache = _stored_kv_cache(layout, model, shards)
    check_config(result.directory, config, layout, model, result.quantized, result.kv_cache, result.add)
    _check_names_and_shapes(config, layout, model, shards, result)
    scalars, zeros = check_values(layout, model, shards, result.quantized, result.kv_cache, result.add)
    scales = (layout, model, scalars, result.quantized, result.kv_cache)
    if not check_input_scales(result.directory, *scales, result.add) and _needs_calibration(result):
        result.notes.append(f"the scales of inputs were not checked: there is no {CALIBRATION_FILE}")
    if original is None:
        for name in zeros:
            result.add(name, "is all zeros; if the original is as well, pass it with --against")
        return result
    damaged = {issue.name for issue in result.issues}
    content = (config, result.directory, layout, model, shards, result.quantized)
    if note := original.check(*content, damaged, result.add):
        result.notes.append(note)
    return result


def _needs_calibration(result: ValidationResult) -> bool:
    has_inputs = any(FORMATS[fmt].input is not None for fmt in result.quantized.values())
    return has_inputs or KV_CACHE_FORMATS[result.kv_cache] is not None


def _passthrough_linears(model: Inventory, shards: Shards) -> list[str]:
    """Return passthrough linears that a server builds next to the language model and that must be excluded: modules
    with a matrix, except routers and embeddings."""
    matrices = [
        name.removesuffix(".weight")
        for name, stored in shards.tensors.items()
        if model.is_passthrough(name) and name.endswith(".weight") and len(stored.shape) == 2
    ]
    return [name for name in matrices if ".gate." not in f"{name}." and "embed" not in name]


def _find_layout(config: dict[str, Any], result: ValidationResult) -> PackedLayout | None:
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in tuple(PACKED_LAYOUTS):
        expected = " or ".join(PACKED_LAYOUTS)
        unquantized = ", so the model is not quantized" if quantization is None else ""
        result.add("config.json", f"quantization_config.quant_method is {method!r}{unquantized}; expected {expected}")
        return None
    result.layout = method
    return PACKED_LAYOUTS[method]


def _stored_format(module: str, layout: PackedLayout, declared: str | None, shards: Shards) -> str | None:
    """Return the format of a linear inferred from its stored tensors, even if one is missing; None if not quantized.

    The dtype of the weight decides if only one format uses it; otherwise (U8) the other stored parts decide. If these
    are ambiguous, for example if an input scale is absent, the format declared in the configuration is used.
    """
    weight = shards.tensors.get(f"{module}.weight")
    dtype = None if weight is None else weight.dtype
    formats = layout.formats
    same_dtype = [name for name, stored in formats.items() if stored.parts["weight"][1] == dtype]
    if candidates := [name for name in same_dtype if formats[name].is_known_by_dtype]:
        return declared if declared in candidates else candidates[0]
    by_parts = [name for name, stored in formats.items() if not stored.is_known_by_dtype]
    parts = {part for name in by_parts for part, _ in formats[name].parts.values()} - {"weight"}
    present = {part for part in parts if f"{module}.{part}" in shards.tensors}
    if not same_dtype and not present:
        return None
    if declared in formats and present <= {part for part, _ in formats[declared].parts.values()}:
        return declared  # its other parts may be missing or of another dtype
    for name in by_parts:
        part, part_dtype = formats[name].parts["weight"]
        if (stored := shards.tensors.get(f"{module}.{part}")) is not None and stored.dtype == part_dtype:
            return name
    return by_parts[0]


def _stored_kv_cache(layout: PackedLayout, model: Inventory, shards: Shards) -> str:
    """Return the KV cache format inferred from the stored scales."""
    for name, kv_format in KV_CACHE_FORMATS.items():
        if kv_format is None:
            continue
        scales = (scale for pair in model.attentions for scale in kv_format.scale_names(layout.name, *pair))
        if any(scale in shards.tensors for scale in scales):
            return name
    return UNQUANTIZED.name


def _expected_tensors(
    config: dict, layout: PackedLayout, model: Inventory, result: ValidationResult
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name -> (dtype, shape) of every tensor that must be stored."""
    dtype_name = config.get("dtype", config.get("torch_dtype"))
    plain = _PLAIN_DTYPES.get(str(dtype_name).removeprefix("torch."))
    if plain is None:
        result.add("config.json", f"dtype is {dtype_name!r}, expected one of {', '.join(_PLAIN_DTYPES)}")
        plain = "BF16"
    tensors = {name: ("F32" if name in model.float32 else plain, shape) for name, shape in model.tensors.items()}
    for module, (rows, columns) in model.linears.items():
        fmt = result.quantized.get(module)
        if fmt is None:
            tensors[f"{module}.weight"] = (plain, (rows, columns))
            continue
        if columns % (block_size := FORMATS[fmt].block_size):
            result.add(module, f"is quantized with {columns} input columns, which is not a multiple of {block_size}")
        for part, dtype_and_shape in layout.expected(fmt, rows, columns).items():
            tensors[f"{module}.{part}"] = dtype_and_shape
    if (kv_format := KV_CACHE_FORMATS[result.kv_cache]) is not None:
        for pair in model.attentions:
            tensors |= dict.fromkeys(kv_format.scale_names(layout.name, *pair), ("F32", layout.scalar_shape))
    return tensors


def _check_names_and_shapes(
    config: dict[str, Any], layout: PackedLayout, model: Inventory, shards: Shards, result: ValidationResult
) -> None:
    expected = _expected_tensors(config, layout, model, result)
    head = f"{model.head}.weight"
    if model.tied_head:
        if model.head in result.quantized:
            result.add(model.head, "is quantized, but tied to the embedding (tie_word_embeddings); expected BF16")
        elif head not in shards.tensors:
            del expected[head]
    for name, (dtype, shape) in expected.items():
        stored = shards.tensors.get(name)
        if stored is None:
            result.add(name, f"is missing; expected {dtype} {list(shape)}")
        elif stored.dtype != dtype:
            result.add(name, f"is {stored.dtype}, expected {dtype}")
        elif stored.shape != shape:
            result.add(name, f"has shape {list(stored.shape)}, expected {list(shape)}")
    quantized_dtypes = {stored.parts["weight"][1] for stored in layout.formats.values()}
    for name in sorted(set(shards.tensors) - set(expected)):
        if not model.is_passthrough(name):
            result.add(name, "is not a tensor of this model")
        elif (dtype := shards.tensors[name].dtype) in quantized_dtypes:
            result.add(name, f"is {dtype}; expected an unquantized tensor outside the language model")
    for name, shape in model.carried.items():
        if (stored := shards.tensors.get(name)) is None:
            result.add(name, f"is missing; expected shape {list(shape)}, of any floating-point type")
        elif stored.shape != shape:
            result.add(name, f"has shape {list(stored.shape)}, expected {list(shape)}")
    for prefix in model.required:
        if not any(name.startswith(prefix) for name in shards.tensors):
            result.add(f"{prefix}*", "is missing; expected tensors with this prefix outside the language model")
    _check_one_format_per_group(model, result)


def _check_one_format_per_group(model: Inventory, result: ValidationResult) -> None:
    """Report linears whose format differs from that of the linears that servers compute together with them."""
    for group in model.fused:
        parts = [module for module in group if module in result.quantized]
        if 0 < len(parts) < len(group):
            unquantized = ", ".join(module for module in group if module not in parts)
            result.add(
                parts[0], f"is quantized, but {unquantized} not; expected all or none of {len(group)} fused linears"
            )
        for module in parts[1:]:
            if result.quantized[module] != (first := result.quantized[parts[0]]):
                result.add(
                    module,
                    f"is {result.quantized[module]}, but {parts[0]} is {first}; expected one format, servers fuse them",
                )
    for group in model.experts:
        first = group[0]
        if differ := [module for module in group if result.quantized.get(module) != result.quantized.get(first)]:
            found, expected = (result.quantized.get(module, UNQUANTIZED.name) for module in (differ[0], first))
            result.add(
                differ[0],
                f"is {found}, but {first} is {expected} ({len(differ)} of {len(group)} linears of this layer's experts "
                "differ); expected one format for all experts of a layer, servers compute them together",
            )
