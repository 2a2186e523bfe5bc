"""A quantization policy: ordered rules that give each linear of a model its format. Data in, data out.

A rule selects by ``kind`` (attention, mlp, head) or by ``name`` (a shell pattern on the Megatron module, such as
``decoder.layers.3.*``) and gives a ``format``. Later rules win. Every rule must reach a linear and every linear must be
reached by a rule: what stays in BF16 stays there on purpose. Left to a later room: rules by position (first, last,
before).
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from megatron_qad.runtime.errors import QADError

FORMATS = ("bf16", "nvfp4")
"""bf16: not quantized. nvfp4: weights and activations in NVFP4 (W4A4)."""
KINDS = ("attention", "mlp", "head")
SHIPPED = Path(__file__).parent / "policies"


class Linear(Protocol):
    """What a policy needs to know of a GEMM; ``models.families`` provides it."""

    megatron: str
    kind: str
    is_tied: bool


@dataclass(frozen=True)
class Rule:
    """One line of a policy. Exactly one of ``kinds`` and ``name`` is set."""

    format: str
    kinds: tuple[str, ...] = ()
    name: str | None = None

    def matches(self, linear: Linear) -> bool:
        if self.name is not None:
            return fnmatch.fnmatchcase(linear.megatron.removesuffix(".weight"), self.name)
        return linear.kind in self.kinds

    def __str__(self):
        return f"{self.name or '+'.join(self.kinds)}={self.format}"


def load(policy: str, overrides: Sequence[str] = ()) -> list[Rule]:
    """Read a policy and append the overriding rules.

    Args:
        policy: a shipped policy's name, or the path of a YAML file with a list ``rules``.
        overrides: rules as text, ``KIND=FORMAT`` or ``PATTERN=FORMAT`` (``head=nvfp4``); they come last and so win.

    Raises:
        QADError: no such policy, an unknown key, kind or format.
    """
    path = Path(policy) if policy.endswith((".yaml", ".yml")) else SHIPPED / f"{policy}.yaml"
    if not path.is_file():
        raise QADError(
            f"no quantization policy {policy!r}: it is neither a YAML file nor one of "
            + ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
        )
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise QADError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict) or set(document) != {"rules"} or not isinstance(document["rules"], list):
        raise QADError(f"{path}: a policy is one list named 'rules', found {document!r:.200}")
    rules = [_parse(entry, str(path)) for entry in document["rules"]]
    for text in overrides:
        selector, separator, fmt = text.partition("=")
        if not separator:
            raise QADError(f"--qad-rule {text!r}: expected KIND=FORMAT or PATTERN=FORMAT, such as head=nvfp4")
        entry = {"format": fmt, **({"kind": selector} if selector in KINDS else {"name": selector})}
        rules.append(_parse(entry, f"--qad-rule {text}"))
    return rules


def _parse(entry: object, where: str) -> Rule:
    if not isinstance(entry, dict) or set(entry) not in ({"kind", "format"}, {"name", "format"}):
        raise QADError(f"{where}: a rule has 'format' and one of 'kind' and 'name'; found {entry!r}")
    if entry["format"] not in FORMATS:
        raise QADError(f"{where}: unknown format {entry['format']!r}; one of {', '.join(FORMATS)}")
    if "name" in entry:
        return Rule(entry["format"], name=str(entry["name"]))
    kinds = entry["kind"] if isinstance(entry["kind"], list) else [entry["kind"]]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise QADError(f"{where}: unknown kind {unknown[0]!r}; one of {', '.join(KINDS)}")
    return Rule(entry["format"], kinds=tuple(kinds))


def resolve(rules: Sequence[Rule], linears: Sequence[Linear]) -> dict[str, str]:
    """The format of every linear, by the name of its Megatron weight (global layer index).

    Raises:
        QADError: a rule that reaches nothing, a linear that no rule reaches, or a tied head told to be quantized.
    """
    formats: dict[str, str] = {}
    for rule in rules:
        reached = [linear for linear in linears if rule.matches(linear)]
        if not reached:
            raise QADError(
                f"policy rule {rule} reaches no linear of this model; its linears are named like {linears[0].megatron}"
            )
        formats |= dict.fromkeys((linear.megatron for linear in reached), rule.format)
    for linear in linears:
        if linear.megatron not in formats:
            raise QADError(
                f"no policy rule reaches {linear.megatron} ({linear.kind}); add one, if only to keep it in bf16"
            )
        if linear.is_tied and formats[linear.megatron] != "bf16":
            raise QADError(
                "the policy quantizes the head, but this model's head is its embedding table "
                f"({linear.megatron} is tied): quantizing it would quantize the embedding. Keep head=bf16"
            )
    return formats
