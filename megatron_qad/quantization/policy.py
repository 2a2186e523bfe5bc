"""A quantization policy: ordered rules that give each linear of a model its format. Data in, data out.

Later rules win. Every rule must reach a linear, every linear must be reached by a rule, and no rule of a document may
be undone by the rules after it: what stays in BF16 stays there on purpose. Rules are read in ``rules``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS
from megatron_qad.quantization.rules import (
    KINDS,
    Linear,
    Rule,
    check_choice,
    did_you_mean,
    module_of,
    parse_override,
    parse_rule,
)

SHIPPED = Path(__file__).parent / "policies"


@dataclass(frozen=True)
class Policy:
    """What a policy document and its overrides say, before it meets a model."""

    name: str
    rules: tuple[Rule, ...]
    kv_cache: str = "bf16"
    """One of ``KV_CACHE_FORMATS``."""


def load(policy: str, overrides: Sequence[str] = (), *, flag: str = "--qad-policy-override") -> Policy:
    """Read a policy and append the overriding rules.

    Args:
        policy: a shipped policy's name, or the path of a YAML file with a list ``rules`` and, optionally, ``kv_cache``.
        overrides: rules as text (``head=nvfp4``; see ``rules``) and ``kv_cache=FORMAT``; they come last and so win.
        flag: how the caller's users write an override, for messages.

    Raises:
        QADError: no such policy, an unknown key, kind or format.
    """
    path = Path(policy) if policy.endswith((".yaml", ".yml")) else SHIPPED / f"{policy}.yaml"
    if not path.is_file():
        shipped = sorted(p.stem for p in SHIPPED.glob("*.yaml"))
        raise QADError(
            f"no quantization policy {policy!r}{did_you_mean(policy, shipped)}: it is neither a YAML file nor one of "
            + ", ".join(shipped)
        )
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise QADError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("rules"), list):
        raise QADError(f"{path}: a policy has a list named 'rules', found {document!r:.200}")
    for key in document:
        check_choice("key", key, ("rules", "kv_cache"), str(path))
    kv_cache = _kv_cache(document.get("kv_cache", "bf16"), str(path))
    rules = [parse_rule(entry, str(path)) for entry in document["rules"]]
    for text in overrides:
        if text.startswith("kv_cache="):
            kv_cache = _kv_cache(text.removeprefix("kv_cache="), f"{flag} {text}")
        else:
            rules.append(parse_override(text, flag))
    return Policy(path.stem, tuple(rules), kv_cache)


def _kv_cache(found: object, where: str) -> str:
    check_choice("KV cache format", found, KV_CACHE_FORMATS, where)
    return found


def resolve(policy: Policy, linears: Sequence[Linear], layer_kinds: Sequence[str] | None = None) -> dict[str, str]:
    """The format of every linear, by the name of its Megatron weight (global layer index).

    Args:
        linears: every GEMM of the model that could be quantized, the head included (``Family.linears``).
        layer_kinds: the kind of every layer of the pattern (``Family.layer_kinds``). Default: as the linears say,
            which is right if no layer is without a linear.

    Raises:
        QADError: a rule that reaches nothing or is undone by later ones, a layer that the model does not have, a linear
            that no rule reaches, a tied head told to be quantized, a KV cache format for a model without attention.
    """
    layer_kinds = layer_kinds_of(linears) if layer_kinds is None else layer_kinds
    if policy.kv_cache != "bf16" and "attention" not in layer_kinds:
        raise QADError(f"policy {policy.name}: kv_cache {policy.kv_cache}, but this model has no attention layer")
    deciding: dict[str, Rule] = {}
    reached: list[list[str]] = []
    for rule in policy.rules:
        selected = [linear.megatron for linear in rule.select(linears, layer_kinds)]
        if not selected and not _is_statement(rule, linears):
            raise QADError(_reaches_nothing(rule, linears))
        reached.append(selected)
        deciding |= dict.fromkeys(selected, rule)
    for rule, selected in zip(policy.rules, reached, strict=True):
        _check_not_undone(policy, rule, selected, deciding)
    for linear in linears:
        if linear.megatron not in deciding:
            raise QADError(
                f"no policy rule reaches {linear.megatron} ({linear.kind}); add one, if only to keep it in bf16"
            )
        if linear.is_tied and FORMATS[deciding[linear.megatron].format].quantizes:
            raise QADError(
                "the policy quantizes the head, but this model's head is its embedding table "
                f"({linear.megatron} is tied): quantizing it would quantize the embedding. Keep head=bf16"
            )
    return {linear.megatron: deciding[linear.megatron].format for linear in linears}


def layer_kinds_of(linears: Sequence[Linear]) -> list[str | None]:
    """The kind of every layer up to the last that has a linear; None for a layer without any."""
    kinds: dict[int, str] = {}
    for linear in linears:
        if linear.layer is not None:
            kinds[linear.layer] = "expert" if linear.kind == "shared_expert" else linear.kind
    return [kinds.get(layer) for layer in range(max(kinds, default=-1) + 1)]


def _is_statement(rule: Rule, linears: Sequence[Linear]) -> bool:
    """A rule that only says of an embedding, or of a router that the model has, what is true anyway."""
    if not rule.kinds or not set(rule.kinds) <= {"embedding", "router"}:
        return False
    return "embedding" in rule.kinds or any(linear.kind == "expert" for linear in linears)


def _check_not_undone(policy: Policy, rule: Rule, selected: list[str], deciding: dict[str, Rule]) -> None:
    """Rules are ordered, so two of them fight if the later leaves the earlier without any effect."""
    if rule.is_override or not selected:
        return
    final = {name: deciding[name] for name in selected}
    if any(later.format == rule.format or later.is_override for later in final.values()):
        return  # some effect is left, the other rule says the same, or the user overrules the document knowingly
    others = ", ".join(dict.fromkeys(f"'{later}'" for later in final.values()))
    raise QADError(
        f"policy {policy.name}: the rule '{rule}' decides nothing, since every linear that it reaches gets another "
        f"format from the later {others}. Put '{rule}' after it, narrow one of them, or remove '{rule}'"
    )


def _reaches_nothing(rule: Rule, linears: Sequence[Linear]) -> str:
    message = f"policy rule {rule} reaches no linear of this model"
    kinds = sorted({linear.kind for linear in linears})
    projections = sorted({module_of(linear).rpartition(".")[2] for linear in linears})
    if rule.first is not None and rule.last is not None:
        message += ": the selectors of one rule must all hold; for 'first and last' write two rules"
    elif rule.kinds and not set(rule.kinds) & set(kinds):
        message += f": it has no linear of kind {' or '.join(rule.kinds)}; its kinds are {', '.join(kinds)}"
    elif rule.projections and not set(rule.projections) & set(projections):
        message += f"{did_you_mean(rule.projections[0], projections)}: its projections are {', '.join(projections)}"
    elif rule.name is not None:
        message += f"{did_you_mean(rule.name, KINDS)}; its linears are named like {module_of(linears[0])}"
        message += ", and what is no linear (router, embedding, norm, conv1d) is never quantized"
    return message
