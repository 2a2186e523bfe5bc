"""A single quantization policy rule: its selectors, its format, and its YAML and command-line syntax.

A rule has a ``format`` and at least one selector. It applies to the linears that match all its selectors. In YAML a
rule is a mapping. On the command line it is ``KIND=FORMAT``, ``MODULE_PATTERN=FORMAT`` or a list of selectors such as
``kind:mamba,before:attention=bf16`` (``+`` separates several values: ``kind:mlp+expert=nvfp4``). For formats with block
scales, ``scales`` and ``update`` say how these are obtained (``expert=nvfp4:four_over_six:frozen``). Layer positions
refer to Megatron's layer pattern, where attention and MLP are separate layers: block i of a Llama is layers 2i and
2i + 1.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.similar_names import did_you_mean
from megatron_qad.formats.block_scales import SCALE_RULES
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.quantization.scale_settings import UPDATES, has_block_scale_rules

NEVER_QUANTIZED = ("router", "embedding", "mtp")
KINDS = ("attention", "mamba", "mlp", "expert", "latent", "shared_expert", "head", *NEVER_QUANTIZED)
LAYER_KINDS = ("attention", "mamba", "mlp", "expert")
"""Kinds of layers in the pattern. An ``expert`` layer also contains its router, its shared experts and the projections
into and out of the latent space of its experts."""
SELECTORS = ("kind", "layer", "first", "last", "before", "projection", "name")
_SCALE_KEYS = {"scales": SCALE_RULES, "update": UPDATES}
_INDEX = re.compile("[0-9]{1,5}")  # no model has 100,000 layers; a longer range would fill the memory
_NOT_A_GEMM = ("conv1d", "norm", "layernorm", "bias", "vision")
_NEVER = (
    "routers, embeddings, norms, conv1d, multi-token prediction layers and vision encoders stay unquantized under "
    "every policy"
)


class Linear(Protocol):
    """The attributes of a linear that policies read. ``models.families`` provides such objects."""

    @property
    def megatron(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def layer(self) -> int | None: ...
    @property
    def is_tied(self) -> bool: ...


def module_name(linear: Linear) -> str:
    """Return the name of the linear's Megatron module."""
    return linear.megatron.removesuffix(".weight")


@dataclass(frozen=True)
class Rule:
    """A format and the selectors that choose its linears. A linear must match every selector that is set."""

    format: str
    scales: str | None = None
    """Rule that chooses the block scales, one of ``SCALE_RULES``. None means the default of the job."""
    update: str | None = None
    """When scales are updated, one of ``UPDATES``. None means every step."""
    kinds: tuple[str, ...] = ()
    """Kinds of linears, from ``KINDS``. ``expert`` includes ``latent``."""
    layers: tuple[int, ...] = ()
    """Layer indices in the layer pattern."""
    first: int | None = None
    """Select the first ``first`` layers of the decoder, of any kind."""
    last: int | None = None
    """Select the last ``last`` layers of the decoder, of any kind."""
    before: str | None = None
    """Select the nearest preceding layer of ``kinds`` for every layer of this kind."""
    projections: tuple[str, ...] = ()
    """Last parts of Megatron module names: linear_qkv, linear_proj, linear_fc1, linear_fc2, in_proj, out_proj."""
    name: str | None = None
    """Shell pattern that must match the full name of the Megatron module."""
    is_override: bool = False
    """Whether the rule comes from the command line. Such rules may fully override rules of the policy file."""

    def select(self, linears: Sequence[Linear], layer_kinds: Sequence[str | None]) -> list[Linear]:
        """Return the linears that this rule applies to. ``layer_kinds`` has one kind per layer of the pattern.

        Raises:
            QADError: the rule names a layer, or more layers, than the model has.
        """
        layers = self._selected_layers(layer_kinds)
        return [linear for linear in linears if self._matches(linear) and (layers is None or linear.layer in layers)]

    def _matches(self, linear: Linear) -> bool:
        module = module_name(linear)
        return (
            (not self.kinds or linear.kind in self.kinds or (linear.kind == "latent" and "expert" in self.kinds))
            and (not self.projections or module.rpartition(".")[2] in self.projections)
            and (self.name is None or fnmatch.fnmatchcase(module, self.name))
        )

    def _selected_layers(self, layer_kinds: Sequence[str | None]) -> set[int] | None:
        """Return the layers that match all positional selectors, or None if the rule has none."""
        num_layers = len(layer_kinds)
        sets = []
        if self.layers:
            if missing := [layer for layer in self.layers if layer >= num_layers]:
                raise QADError(
                    f"policy rule {self}: there is no layer {missing[0]} in a model with layers 0 to {num_layers - 1}. "
                    "Choose a layer of the model."
                )
            sets.append(set(self.layers))
        for end, count in (("first", self.first), ("last", self.last)):
            if count is not None:
                if count > num_layers:
                    raise QADError(
                        f"policy rule {self}: {end} {count} layers of a model with {num_layers}. Choose fewer layers."
                    )
                sets.append(set(range(count) if end == "first" else range(num_layers - count, num_layers)))
        if self.before is not None:
            sets.append(self._preceding_layers(layer_kinds))
        return set.intersection(*sets) if sets else None

    def _preceding_layers(self, layer_kinds: Sequence[str | None]) -> set[int]:
        candidates = {layer_kind(kind) for kind in self.kinds}
        preceding, nearest = set(), None
        for layer, kind in enumerate(layer_kinds):
            if kind == self.before and nearest is not None:
                preceding.add(nearest)
            if kind in candidates:
                nearest = layer
        return preceding

    def __str__(self):
        """Return the rule in command-line syntax."""
        result = ":".join(filter(None, self.result))
        if self.name is not None and not self._parts(skip="name"):
            return f"{self.name}={result}"
        if self.kinds and not self._parts(skip="kind"):
            return f"{'+'.join(self.kinds)}={result}"
        return f"{','.join(self._parts())}={result}"

    @property
    def result(self) -> tuple[str, str | None, str | None]:
        """What the rule gives its linears: format, scales and update."""
        return self.format, self.scales, self.update

    def _parts(self, skip: str = "") -> list[str]:
        values = {
            "kind": "+".join(self.kinds),
            "layer": "+".join(map(str, self.layers)),
            "first": self.first,
            "last": self.last,
            "before": self.before,
            "projection": "+".join(self.projections),
            "name": self.name,
        }
        return [f"{key}:{value}" for key, value in values.items() if value not in ("", None) and key != skip]


def layer_kind(kind: str) -> str:
    """Return the kind of the layer that holds linears of a kind, one of ``LAYER_KINDS`` or ``kind`` itself."""
    return "expert" if kind in ("shared_expert", "latent") else kind


def parse_rule(entry: object, where: str, *, is_override: bool = False) -> Rule:
    """Parse a rule in YAML form. ``where`` is the file or flag that error messages name.

    Raises:
        QADError: an unknown key, kind or format (the message suggests the nearest valid one), a value of the wrong
            type, or a quantized format for a module that is never quantized.
    """
    if not isinstance(entry, dict) or "format" not in entry or len(entry) < 2:
        raise QADError(
            f"{where}: found the rule {entry!r:.200}. A rule needs 'format' and at least one of {', '.join(SELECTORS)}."
        )
    if not any(key in SELECTORS for key in entry) and all(key in ("format", *_SCALE_KEYS) for key in entry):
        raise QADError(f"{where}: found the rule {entry!r:.200}. A rule needs at least one of {', '.join(SELECTORS)}.")
    for key in entry:
        check_choice("key", key, ("format", *_SCALE_KEYS, *SELECTORS), where)
    check_choice("format", entry["format"], FORMATS, where)
    _check_scales(entry, where)
    kinds = _strings(entry, "kind", where)
    for kind in kinds:
        if kind in _NOT_A_GEMM:
            raise QADError(f"{where}: rules cannot select the kind {kind!r}. Remove it: {_NEVER}, without a rule.")
        check_choice("kind", kind, KINDS, where)
    projections = _strings(entry, "projection", where)
    if FORMATS[entry["format"]].quantizes:
        never = [word for word in (*kinds, *projections) if word in (*NEVER_QUANTIZED, *_NOT_A_GEMM)]
        if never:
            raise QADError(f"{where}: a rule gives {never[0]!r} the format {entry['format']}, but {_NEVER}. Remove it.")
    before = entry.get("before")
    if "before" in entry:
        check_choice("kind of layer", before, LAYER_KINDS, where)
        if not kinds:
            raise QADError(
                f"{where}: found {entry!r}. 'before: {before}' also needs 'kind', the kind of the preceding layer."
            )
    return Rule(
        format=entry["format"],
        scales=entry.get("scales"),
        update=entry.get("update"),
        kinds=kinds,
        layers=_layer_indices(entry, where),
        first=_num_layers(entry, "first", where),
        last=_num_layers(entry, "last", where),
        before=before,
        projections=projections,
        name=_pattern(entry, where),
        is_override=is_override,
    )


def _check_scales(entry: dict, where: str) -> None:
    """Check ``scales`` and ``update``, which only formats with block scales can have (apart from the rule max)."""
    for key, choices in _SCALE_KEYS.items():
        if key not in entry:
            continue
        value, fmt = entry[key], entry["format"]
        check_choice("scale rule" if key == "scales" else "update", value, choices, where)
        if not has_block_scale_rules(fmt) and value not in ("max", "every_step"):
            formats = [name for name in FORMATS if has_block_scale_rules(name)]
            raise QADError(
                f"{where}: found '{key}: {value}' with format {fmt}, whose scales always follow from the largest "
                f"magnitude. Remove '{key}', or choose a format with block scales: {', '.join(formats)}."
            )


def parse_override(text: str, flag: str = "--qad-policy-override") -> Rule:
    """Parse a rule in command-line form. ``flag`` is the option that error messages name.

    Example:
        >>> rule = parse_override("kind:mamba,before:attention=bf16")
        >>> rule.kinds, rule.before, rule.format
        (('mamba',), 'attention', 'bf16')
        >>> rule = parse_override("expert=nvfp4:four_over_six:frozen")
        >>> rule.format, rule.scales, rule.update
        ('nvfp4', 'four_over_six', 'frozen')
    """
    selector, separator, result = text.rpartition("=")
    if not separator or not selector:
        raise QADError(f"{flag} {text!r}: expected KIND=FORMAT or PATTERN=FORMAT, for example head=nvfp4.")
    where = f"{flag} {text}"
    result = _parse_result(result, where)
    if ":" not in selector:
        kinds = selector.split("+")
        entry = {"kind": kinds} if all(kind in KINDS or kind in _NOT_A_GEMM for kind in kinds) else {"name": selector}
        return parse_rule({**entry, **result}, where, is_override=True)
    entry = {}
    for part in selector.split(","):
        key, _, value = part.partition(":")
        values = [int(v) if _INDEX.fullmatch(v) else v for v in (value.split("+") if key != "name" else [value])]
        entry[key] = values if len(values) > 1 else values[0]
    return parse_rule({**entry, **result}, where, is_override=True)


def _parse_result(text: str, where: str) -> dict[str, str]:
    """Return the entries of "FORMAT[:SCALES][:UPDATE]"; a missing part has no entry."""
    fmt, *options = text.split(":")
    result = {"format": fmt}
    for option in options:
        check_choice("scale rule or update", option, (*SCALE_RULES, *UPDATES), where)
        key = "scales" if option in SCALE_RULES else "update"
        if key in result:
            raise QADError(f"{where}: found {result[key]!r} and {option!r}, expected one of them. Remove the other.")
        result[key] = option
    return result


def check_choice(label: str, value: object, valid: Iterable[str], where: str) -> None:
    """Raise a ``QADError`` that suggests the nearest valid value if ``value`` is not in ``valid``."""
    valid = tuple(valid)
    if value in valid:
        return
    raise QADError(
        f"{where}: unknown {label} {value!r:.200}{did_you_mean(value, valid)}. Choose one of {', '.join(valid)}."
    )


def _strings(entry: dict, key: str, where: str) -> tuple[str, ...]:
    if key not in entry:
        return ()
    values = entry[key] if isinstance(entry[key], list) else [entry[key]]
    if not values or not all(isinstance(value, str) for value in values):
        raise QADError(f"{where}: '{key}' must be a string or a list of strings; found {entry[key]!r}.")
    return tuple(values)


def _pattern(entry: dict, where: str) -> str | None:
    name = entry.get("name")
    if "name" in entry and (not isinstance(name, str) or not name):
        raise QADError(f"{where}: 'name' must be a pattern of module names; found {name!r:.200}.")
    return name


def _num_layers(entry: dict, key: str, where: str) -> int | None:
    count = entry.get(key)
    if key in entry and (type(count) is not int or count < 1):
        raise QADError(f"{where}: '{key}' must be a number of layers, at least 1; found {count!r}.")
    return count


def _layer_indices(entry: dict, where: str) -> tuple[int, ...]:
    """Return the indices of the ``layer`` selector: an index, an inclusive range "a-b", or a list of these."""
    if "layer" not in entry:
        return ()
    indices = []
    for item in entry["layer"] if isinstance(entry["layer"], list) else [entry["layer"]]:
        first, _, last = str(item).partition("-")
        last = last or first
        if isinstance(item, bool) or not (
            _INDEX.fullmatch(first) and _INDEX.fullmatch(last) and int(first) <= int(last)
        ):
            raise QADError(
                f"{where}: 'layer' must be an index, a range such as 0-3, or a list of these; found {item!r:.200}."
            )
        indices += range(int(first), int(last) + 1)
    if not indices:
        raise QADError(f"{where}: 'layer' is an empty list. Give at least one layer.")
    return tuple(indices)
