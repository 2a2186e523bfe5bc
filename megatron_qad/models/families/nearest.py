"""The refusal of a model that no family here describes: the nearest family, and what of the config is not built."""

import difflib
from collections.abc import Iterable
from typing import Any

from megatron_qad.engine.errors import QADError
from megatron_qad.models.families.base import Family
from megatron_qad.models.families.unbuilt import HOWTO, describe, of_other_family

_MIN_SHARE = 0.65
"""Smallest share of a family's config keys with which it counts as similar."""
_SAME = {
    "hidden_activation": "hidden_act",
    "mamba_d_conv": "conv_kernel",
    "mamba_d_head": "mamba_head_dim",
    "mamba_d_state": "ssm_state_size",
    "mamba_n_groups": "n_groups",
    "mamba_n_heads": "mamba_num_heads",
    "num_local_experts": "num_experts",
    "rope_scaling": "rope_parameters",
    "rope_theta": "rope_parameters",
}
"""Other names of keys in ``Family.config_keys``."""


def refusal(config: dict, architecture: str, families: Iterable[Family]) -> QADError:
    """Return the error for a config of an architecture that is not supported."""
    families = tuple(families)
    text = _language_model(config)
    found = of_other_family(config, text)
    parts = [f"config.json: architecture {architecture!r:.100}{_model_type(config)} is not supported."]
    parts.append(f"Supported: {', '.join(sorted(family.architecture for family in families))}.")
    parts.append(_nearest(architecture, config, text, families))
    if found:
        parts.append(f"Not built for any family: {describe(found)}.")
    parts.append(f"{HOWTO} explains how to add a family.")
    return QADError(" ".join(parts))


def _nearest(architecture: str, config: dict, text: dict, families: tuple[Family, ...]) -> str:
    keys = {_SAME.get(key, key) for key in text}

    def likeness(family: Family) -> float:
        names = (
            difflib.SequenceMatcher(None, theirs.lower(), ours.lower()).ratio()
            for theirs, ours in (
                (architecture, family.architecture),
                (str(config.get("model_type")), family.model_type),
            )
        )
        # Names count less than entries: GraniteForCausalLM is a Llama with factors, GraniteMoeHybrid has Mamba layers.
        return _f1(keys, family) + 0.1 * sum(names)

    nearest = max(families, key=likeness)
    shared = keys & nearest.config_keys
    if len(shared) < _MIN_SHARE * len(nearest.config_keys):
        return "No supported family is similar."
    total = len(nearest.config_keys)
    return f"The nearest is {nearest.architecture}: the config has {len(shared)} of its {total} main keys."


def _f1(keys: set[str], family: Family) -> float:
    """Return the agreement of two sets of keys, from 0 to 1."""
    shared = len(keys & family.config_keys)
    return 2 * shared / (len(keys) + len(family.config_keys)) if shared else 0.0


def _language_model(config: dict) -> dict:
    """Return the part of a wrapper's config that describes its language model."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(part := config.get(key), dict):
            return part
    return config


def _model_type(config: dict[str, Any]) -> str:
    return f" (model_type {config['model_type']!r:.60})" if config.get("model_type") is not None else ""
