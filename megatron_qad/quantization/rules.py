"""One rule of a quantization policy: which linears it selects, and how it is written.

A rule has a ``format`` and one selector or more; it reaches the linears that all its selectors accept. In YAML a rule
is a mapping; on a command line it is ``KIND=FORMAT``, ``MODULE_PATTERN=FORMAT`` or, for any selectors,
``kind:mamba,before:attention=bf16`` (lists are joined with ``+``: ``kind:mlp+expert=nvfp4``). Positions count the
layers of Megatron's layer pattern, in which attention and MLP are layers of their own: block i of a Llama is layers 2i
and 2i + 1.
"""

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format_registry import FORMATS

NEVER_QUANTIZED = ("router", "embedding")
KINDS = ("attention", "mamba", "mlp", "expert", "shared_expert", "head", *NEVER_QUANTIZED)
LAYER_KINDS = ("attention", "mamba", "mlp", "expert")
"""What a layer of the pattern can be; a layer of experts also holds its router and its shared experts."""
SELECTORS = ("kind", "layer", "first", "last", "before", "projection", "name")
_NO_GEMM = ("conv1d", "norm", "layernorm", "bias", "vision")
_NEVER = "routers, embeddings, norms, conv1d and vision encoders stay unquantized under every policy"


class Linear(Protocol):
    """What a policy needs to know of a GEMM; ``models.families`` provides it."""

    megatron: str
    kind: str
    layer: int | None
    is_tied: bool


def module_of(linear: Linear) -> str:
    return linear.megatron.removesuffix(".weight")


@dataclass(frozen=True)
class Rule:
    """Which linears (all selectors that are set must accept one), and their format."""

    format: str
    kinds: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    """Indices in the layer pattern."""
    first: int | None = None
    """The first n layers of the decoder, whatever their kind."""
    last: int | None = None
    before: str | None = None
    """For every layer of this kind, the nearest layer of ``kinds`` that precedes it."""
    projections: tuple[str, ...] = ()
    """Last part of the Megatron module's name: linear_qkv, linear_proj, linear_fc1, linear_fc2, in_proj, out_proj."""
    name: str | None = None
    """Shell pattern on the whole name of the Megatron module."""
    is_override: bool = False
    """Given on the command line, where it may overrule a document's rule without saying so."""

    def select(self, linears: Sequence[Linear], layer_kinds: Sequence[str | None]) -> list[Linear]:
        """The linears that this rule reaches. ``layer_kinds``: the kind of every layer of the pattern.

        Raises:
            QADError: a layer, or a number of layers, that the model does not have.
        """
        layers = self._layers(layer_kinds)
        return [linear for linear in linears if self._accepts(linear) and (layers is None or linear.layer in layers)]

    def _accepts(self, linear: Linear) -> bool:
        module = module_of(linear)
        return (
            (not self.kinds or linear.kind in self.kinds)
            and (not self.projections or module.rpartition(".")[2] in self.projections)
            and (self.name is None or fnmatch.fnmatchcase(module, self.name))
        )

    def _layers(self, layer_kinds: Sequence[str | None]) -> set[int] | None:
        """Layers that the positional selectors leave; None if there is no such selector."""
        total = len(layer_kinds)
        sets = []
        if self.layers:
            if beyond := [layer for layer in self.layers if layer >= total]:
                raise QADError(f"policy rule {self}: layer {beyond[0]} of a model with layers 0 to {total - 1}")
            sets.append(set(self.layers))
        for which, number in (("first", self.first), ("last", self.last)):
            if number is not None:
                if number > total:
                    raise QADError(f"policy rule {self}: {which} {number} layers of a model with {total}")
                sets.append(set(range(number) if which == "first" else range(total - number, total)))
        if self.before is not None:
            sets.append(self._preceding(layer_kinds))
        return set.intersection(*sets) if sets else None

    def _preceding(self, layer_kinds: Sequence[str | None]) -> set[int]:
        wanted = {"expert" if kind == "shared_expert" else kind for kind in self.kinds}
        found, nearest = set(), None
        for layer, kind in enumerate(layer_kinds):
            if kind == self.before and nearest is not None:
                found.add(nearest)
            if kind in wanted:
                nearest = layer
        return found

    def __str__(self):
        """As it would be written on a command line."""
        if self.name is not None and not self._parts(skip="name"):
            return f"{self.name}={self.format}"
        if self.kinds and not self._parts(skip="kind"):
            return f"{'+'.join(self.kinds)}={self.format}"
        return f"{','.join(self._parts())}={self.format}"

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


def parse_rule(entry: object, where: str, *, is_override: bool = False) -> Rule:
    """A rule as YAML has it. ``where``: the file or flag, for messages.

    Raises:
        QADError: an unknown key, kind or format (the nearest valid one is named), a value of another type, a quantized
            format for what is never quantized.
    """
    if not isinstance(entry, dict) or "format" not in entry or len(entry) < 2:
        raise QADError(f"{where}: a rule has 'format' and at least one of {', '.join(SELECTORS)}; found {entry!r}")
    for key in entry:
        check_choice("key", key, ("format", *SELECTORS), where)
    check_choice("format", entry["format"], FORMATS, where)
    kinds = _texts(entry, "kind", where)
    for kind in kinds:
        if kind in _NO_GEMM:
            raise QADError(f"{where}: {kind!r} is no kind that a rule can select: {_NEVER}, and need no rule")
        check_choice("kind", kind, KINDS, where)
    projections = _texts(entry, "projection", where)
    if FORMATS[entry["format"]].quantizes:
        never = [found for found in (*kinds, *projections) if found in (*NEVER_QUANTIZED, *_NO_GEMM)]
        if never:
            raise QADError(
                f"{where}: a rule gives {never[0]!r} the format {entry['format']}, but {_NEVER}; take it out"
            )
    before = entry.get("before")
    if before is not None:
        check_choice("kind of layer", before, LAYER_KINDS, where)
        if not kinds:
            raise QADError(f"{where}: 'before: {before}' needs 'kind', the kind of the layer that precedes ({entry!r})")
    return Rule(
        format=entry["format"],
        kinds=kinds,
        layers=_indices(entry, where),
        first=_count(entry, "first", where),
        last=_count(entry, "last", where),
        before=before,
        projections=projections,
        name=None if "name" not in entry else str(entry["name"]),
        is_override=is_override,
    )


def parse_override(text: str, flag: str = "--qad-policy-override") -> Rule:
    """A rule as a command line has it."""
    selector, separator, fmt = text.rpartition("=")
    if not separator or not selector:
        raise QADError(f"{flag} {text!r}: expected KIND=FORMAT or PATTERN=FORMAT, such as head=nvfp4")
    where = f"{flag} {text}"
    if ":" not in selector:
        kinds = selector.split("+")
        entry = {"kind": kinds} if all(kind in KINDS or kind in _NO_GEMM for kind in kinds) else {"name": selector}
        return parse_rule({**entry, "format": fmt}, where, is_override=True)
    entry = {}
    for part in selector.split(","):
        key, _, value = part.partition(":")
        values = [int(v) if v.isdecimal() else v for v in (value.split("+") if key != "name" else [value])]
        entry[key] = values if len(values) > 1 else values[0]
    return parse_rule({**entry, "format": fmt}, where, is_override=True)


def check_choice(what: str, found: object, valid: Iterable[str], where: str) -> None:
    """Stop at a word that is not one of ``valid``, naming the nearest."""
    valid = tuple(valid)
    if found in valid:
        return
    raise QADError(f"{where}: unknown {what} {found!r}{did_you_mean(found, valid)}; one of {', '.join(valid)}")


def did_you_mean(found: object, valid: Iterable[str]) -> str:
    """``"; did you mean 'mlp'?"``, or nothing if no word is near."""
    close = difflib.get_close_matches(str(found), list(valid), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _texts(entry: dict, key: str, where: str) -> tuple[str, ...]:
    if key not in entry:
        return ()
    values = entry[key] if isinstance(entry[key], list) else [entry[key]]
    if not values or not all(isinstance(value, str) for value in values):
        raise QADError(f"{where}: '{key}' is a word or a list of words; found {entry[key]!r}")
    return tuple(values)


def _count(entry: dict, key: str, where: str) -> int | None:
    number = entry.get(key)
    if key in entry and (type(number) is not int or number < 1):
        raise QADError(f"{where}: '{key}' is a number of layers, at least 1; found {number!r}")
    return number


def _indices(entry: dict, where: str) -> tuple[int, ...]:
    """``layer``: an index, a range "a-b" with both ends, or a list of these."""
    if "layer" not in entry:
        return ()
    indices = []
    for item in entry["layer"] if isinstance(entry["layer"], list) else [entry["layer"]]:
        bounds = re.fullmatch(r"(\d+)-(\d+)", str(item)) or re.fullmatch(r"((\d+))", str(item))
        if bounds is None or isinstance(item, bool) or int(bounds[2]) < int(bounds[1]):
            raise QADError(f"{where}: 'layer' is an index, a range such as 0-3, or a list of these; found {item!r}")
        indices += range(int(bounds[1]), int(bounds[2]) + 1)
    if not indices:
        raise QADError(f"{where}: 'layer' is an empty list")
    return tuple(indices)
