"""Quantization policies: ordered rules that assign a format, and how its scales are obtained, to each linear.

Later rules win. Every rule must match a linear, every linear must match a rule, and later rules of a policy file must
not fully override an earlier one. This way no linear stays in BF16 by accident. ``rules`` parses single rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.similar_names import did_you_mean
from megatron_qad.engine.text_files import read_yaml
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS
from megatron_qad.quantization.policy_file import find_policy
from megatron_qad.quantization.rules import (
    KINDS,
    NEVER_QUANTIZED,
    Linear,
    Rule,
    check_choice,
    layer_kind,
    module_name,
    parse_override,
    parse_rule,
)
from megatron_qad.quantization.scale_settings import NEW_JOBS, ScaleSetting, has_block_scale_rules


@dataclass(frozen=True)
class Policy:
    """The rules and the KV cache format of a policy file and its overrides, independent of any model."""

    name: str
    rules: tuple[Rule, ...]
    kv_cache: str = "bf16"
    """KV cache format, one of ``KV_CACHE_FORMATS``."""

    @classmethod
    def load(cls, policy: str, overrides: Sequence[str] = ()) -> "Policy":
        """Load a shipped policy by its name, or a YAML file, and append override rules; see ``policy.load``.

        Example:
            >>> Policy.load("nvfp4-all-linear", ["head=nvfp4"]).name
            'nvfp4-all-linear'
        """
        return load(policy, overrides, flag="overrides:")


_ABOUT = ("models", "source")
"""Keys of a policy file that say for which models it is and where it comes from."""


def load(policy: str, overrides: Sequence[str] = (), *, flag: str = "--qad-policy-override") -> Policy:
    """Load a policy and append the override rules.

    Args:
        policy: the name of a shipped policy, or the path of a YAML file with ``rules`` and, optionally, ``kv_cache``,
            ``models`` and ``source``. The last two are texts for readers.
        overrides: rules in command-line form (``head=nvfp4``; see ``rules``) or ``kv_cache=FORMAT``. They win.
        flag: the command-line option for overrides, for error messages.

    Raises:
        QADError: the policy does not exist, or it has an unknown key, kind or format.

    Example:
        >>> policy = load("nvfp4-all-linear", ["head=nvfp4", "kv_cache=fp8"])
        >>> policy.kv_cache, [str(rule) for rule in policy.rules]
        ('fp8', ['attention+mamba+mlp+expert+shared_expert=nvfp4', 'head=bf16', 'head=nvfp4'])
    """
    path = find_policy(policy)
    document = read_yaml(path, str(path))
    if not isinstance(document, dict) or not isinstance(document.get("rules"), list):
        raise QADError(f"{path}: a policy needs a list named 'rules'; found {document!r:.200}.")
    for key in document:
        check_choice("key", key, ("rules", "kv_cache", *_ABOUT), str(path))
    for key in _ABOUT:
        if not isinstance(document.get(key, ""), str):
            raise QADError(f"{path}: '{key}' must be a text for readers; found {document[key]!r:.200}.")
    kv_cache = _checked_kv_cache(document.get("kv_cache", "bf16"), str(path))
    rules = [parse_rule(entry, str(path)) for entry in document["rules"]]
    for text in overrides:
        if text.startswith("kv_cache="):
            kv_cache = _checked_kv_cache(text.removeprefix("kv_cache="), f"{flag} {text}")
        else:
            rules.append(parse_override(text, flag))
    return Policy(path.stem, tuple(rules), kv_cache)


def _checked_kv_cache(value: object, where: str) -> str:
    check_choice("KV cache format", value, KV_CACHE_FORMATS, where)
    return str(value)


def resolve(policy: Policy, linears: Sequence[Linear], layer_kinds: Sequence[str] | None = None) -> dict[str, str]:
    """Return the format of every linear, by Megatron weight name (with the global layer index).

    Args:
        linears: all quantizable linears of the model, including the head (``Family.linears``).
        layer_kinds: the kind of every layer of the pattern (``Family.layer_kinds``). Default: derived from ``linears``,
            which is correct if every layer has a linear.

    Raises:
        QADError: a rule matches no linear, names a layer that the model does not have or is fully overridden by later
            rules; no rule matches a linear; a rule quantizes a tied head; the experts of a layer have several formats;
            a KV cache format without attention layers.

    Example:
        >>> formats = resolve(load("nvfp4-all-linear"), family_of(config).linears(config))
        >>> formats["decoder.layers.1.mlp.linear_fc1.weight"], formats["output_layer.weight"]
        ('nvfp4', 'bf16')
    """
    formats = {name: rule.format for name, rule in _final_rules(policy, linears, layer_kinds).items()}
    _check_experts_agree(policy, linears, formats)
    return formats


def resolve_scales(
    policy: Policy,
    linears: Sequence[Linear],
    layer_kinds: Sequence[str | None] | None = None,
    *,
    default: ScaleSetting = NEW_JOBS,
) -> dict[str, ScaleSetting]:
    """Return how the scales of each weight with block scales are obtained, by Megatron weight name.

    q, k and v are one linear, and so are gate and up. So what servers fuse agrees, except for experts, which are
    checked.

    Args:
        linears, layer_kinds: as for ``resolve``.
        default: setting of the linears whose policy rule has neither ``scales`` nor ``update``
            (``--qad-weight-scale-rule``). A rule with ``scales`` alone means every step; one with ``update`` alone
            takes the scale rule of ``default``.

    Raises:
        QADError: as ``resolve``; experts of a layer have several settings; or a setting has the rule local_hessian,
            and its scales are not frozen.

    Example:
        >>> policy = load("nvfp4-all-linear", ["mlp=nvfp4:four_over_six:frozen"])
        >>> scales = resolve_scales(policy, family_of(config).linears(config))
        >>> str(scales["decoder.layers.1.mlp.linear_fc1.weight"])
        'four_over_six:frozen'
    """
    settings = {
        name: _setting(rule, default)
        for name, rule in _final_rules(policy, linears, layer_kinds).items()
        if has_block_scale_rules(rule.format)
    }
    for name, setting in settings.items():
        if setting.needs_moments and not setting.is_frozen:
            raise QADError(
                f"policy {policy.name}: {name} has the scale rule local_hessian, which needs 'update: frozen', because "
                "statistics of its input are collected once, in the calibration. Add it (on the command line "
                "FORMAT:local_hessian:frozen), or choose mse_sweep, which searches the same scales."
            )
    _check_experts_agree(policy, [linear for linear in linears if linear.megatron in settings], settings)
    return settings


def _setting(rule: Rule, default: ScaleSetting) -> ScaleSetting:
    if rule.scales is None and rule.update is None:
        return default
    return ScaleSetting(rule.scales or default.rule, rule.update or "every_step")


def _final_rules(
    policy: Policy, linears: Sequence[Linear], layer_kinds: Sequence[str | None] | None
) -> dict[str, Rule]:
    """Return the rule that decides each linear, by Megatron weight name. Errors are those of ``resolve``."""
    layer_kinds = layer_kinds_of(linears) if layer_kinds is None else layer_kinds
    if policy.kv_cache != "bf16" and "attention" not in layer_kinds:
        raise QADError(
            f"policy {policy.name}: kv_cache {policy.kv_cache}, but this model has no attention layer. Choose bf16."
        )
    final_rules: dict[str, Rule] = {}
    matched: list[list[str]] = []
    for rule in policy.rules:
        selected = [linear.megatron for linear in rule.select(linears, layer_kinds)]
        if not selected and not _states_default(rule, linears):
            raise QADError(_no_match_message(rule, linears))
        matched.append(selected)
        final_rules |= dict.fromkeys(selected, rule)
    for rule, selected in zip(policy.rules, matched, strict=True):
        _check_has_effect(policy, rule, selected, final_rules)
    for linear in linears:
        if linear.megatron not in final_rules:
            raise QADError(
                f"no policy rule matches {linear.megatron} ({linear.kind}). Add one, for example {linear.kind}=bf16."
            )
        if linear.is_tied and FORMATS[final_rules[linear.megatron].format].quantizes:
            raise QADError(
                f"{linear.megatron}: the policy quantizes the head, but this model's head is tied to its embedding "
                "table, which would be quantized too. Keep head=bf16."
            )
    return {linear.megatron: final_rules[linear.megatron] for linear in linears}


def _check_experts_agree(policy: Policy, linears: Sequence[Linear], found_by_name: Mapping[str, object]) -> None:
    """Check that all experts of a layer have one format, or one setting of their scales, in all their linears.

    Servers run a layer's experts with one fused method. vLLM takes the method of the layer's first name that it knows,
    so one expert in BF16 leaves the complete layer without quantization, or with scales that were never loaded.
    """
    first: dict[int | None, Linear] = {}
    for linear in linears:
        if ".experts." not in linear.megatron:
            continue
        other = first.setdefault(linear.layer, linear)
        found, expected = found_by_name[linear.megatron], found_by_name[other.megatron]
        if found != expected:
            layer = module_name(linear).partition(".experts.")[0]
            is_format = isinstance(found, str)
            raise QADError(
                f"policy {policy.name}: {module_name(linear)} {'is' if is_format else 'has scales'} {found}, but "
                f"{module_name(other)} of the same layer {'is' if is_format else 'has'} {expected}. Servers compute "
                f"all experts of a layer together. Give them one {'format' if is_format else 'scale setting'}, for "
                f"example '{layer}.experts.*={found if is_format else f'FORMAT:{found}'}'."
            )


def layer_kinds_of(linears: Sequence[Linear]) -> list[str | None]:
    """Return the kind of every layer up to the last one with a linear. Layers without a linear are None."""
    kinds: dict[int, str] = {}
    for linear in linears:
        if linear.layer is not None:
            kinds[linear.layer] = layer_kind(linear.kind)
    return [kinds.get(layer) for layer in range(max(kinds, default=-1) + 1)]


def _states_default(rule: Rule, linears: Sequence[Linear]) -> bool:
    """Whether a rule only states what always holds: that embeddings, multi-token prediction layers, or routers that the
    model has, stay in BF16."""
    if not rule.kinds or not set(rule.kinds) <= set(NEVER_QUANTIZED):
        return False
    return set(rule.kinds) != {"router"} or any(linear.kind == "expert" for linear in linears)


def _check_has_effect(policy: Policy, rule: Rule, selected: list[str], final_rules: dict[str, Rule]) -> None:
    """Check that later rules leave at least one linear to this rule, or that the user overrides it explicitly."""
    if rule.is_override or not selected:
        return
    final = {name: final_rules[name] for name in selected}
    if any(later.result == rule.result or later.is_override for later in final.values()):
        return  # the rule has an effect, a later rule agrees with it, or the command line overrides it on purpose
    later_rules = ", ".join(dict.fromkeys(f"'{later}'" for later in final.values()))
    raise QADError(
        f"policy {policy.name}: the rule '{rule}' has no effect, because all its linears get another format from the "
        f"later {later_rules}. Move '{rule}' to the end, make one of them more specific, or remove '{rule}'."
    )


def _no_match_message(rule: Rule, linears: Sequence[Linear]) -> str:
    message = f"policy rule {rule} matches no linear of this model"
    kinds = sorted({linear.kind for linear in linears})
    projections = sorted({module_name(linear).rpartition(".")[2] for linear in linears})
    if rule.first is not None and rule.last is not None:
        message += ": a linear must match all selectors of a rule. For 'first or last' write two rules"
    elif rule.kinds and not set(rule.kinds) & set(kinds):
        message += f": it has no linear of kind {' or '.join(rule.kinds)}. Its kinds are {', '.join(kinds)}"
    elif rule.projections and not set(rule.projections) & set(projections):
        message += f"{did_you_mean(rule.projections[0], projections)}. Its projections are {', '.join(projections)}"
    elif rule.name is not None:
        message += f"{did_you_mean(rule.name, KINDS)}. Its linears have names like {module_name(linears[0])}; "
        message += "other modules (router, embedding, norm, conv1d) are never quantized"
    return f"{message}."
