"""Rotary embedding of a ``config.json``: base, type and scaling, in the spellings of transformers 4 and 5.

Older files have ``rope_theta`` and ``rope_scaling`` (with ``type`` or ``rope_type``), newer ones ``rope_parameters``.
Values are those that transformers computes from the same file. Where transformers and vLLM read a file differently, it
is refused.
"""

from typing import Any

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError

_DEFAULT_THETA = 10000.0
_ORIGINAL = "original_max_position_embeddings"


def rotary_base(config: dict) -> int:
    """Return ``rope_theta``. It must be an integer, as Megatron's ``--rotary-base`` is."""
    rope = _parameters(config)
    source = rope if rope.get("rope_theta") is not None else config
    theta = values.number(source, "rope_theta", _DEFAULT_THETA, above=1, maximum=float(2**53))
    if theta != int(theta):
        raise QADError(f"{values.place(source)}: rope_theta {theta} must be an integer for Megatron.")
    return int(theta)


def rope_scaling(config: dict) -> dict[str, Any] | None:
    """Return the llama3 scaling for ``rope.llama3_inv_freq``, or None for plain rope.

    Raises:
        QADError: another type, missing or invalid values, or contradictory entries.
    """
    rope = _parameters(config)
    _check_whole_head(config, rope)
    theta, rope_type = rotary_base(config), _rope_type(rope)
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise QADError(
            f"{values.place(rope)}: rope type {rope_type!r:.100} is not supported. Expected default or llama3."
        )
    low = values.number(rope, "low_freq_factor", above=0)
    return {
        "rope_type": "llama3",
        "rope_theta": float(theta),
        "factor": values.number(rope, "factor", above=0),
        "low_freq_factor": low,
        "high_freq_factor": values.number(rope, "high_freq_factor", above=low),
        _ORIGINAL: _original_length(config, rope),
    }


def _parameters(config: dict) -> values.Section:
    old, new = (values.section(config, key, None) for key in ("rope_scaling", "rope_parameters"))
    if old and new and old != new:
        raise QADError(
            f"{values.place(config)}: rope_scaling {dict(old)!r:.200} and rope_parameters {dict(new)!r:.200} differ, "
            "and loaders disagree which one counts. Remove one of them."
        )
    rope = old or new or values.section({}, "rope_parameters", {})
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise QADError(
            f"{values.place(rope)}: separate rope parameters for {nested[0]!r:.100}. Only one set for all layers is "
            "supported."
        )
    return rope


def _rope_type(rope: values.Section) -> str:
    types = {values.text(rope, key) for key in ("rope_type", "type") if rope.get(key) is not None}
    if len(types) > 1:
        raise QADError(
            f"{values.place(rope)}: rope_type {rope['rope_type']!r:.100} and type {rope['type']!r:.100} differ. "
            "Remove the wrong one."
        )
    return types.pop() if types else "default"


def _check_whole_head(config: dict, rope: values.Section) -> None:
    for source in (config, rope):
        if (factor := values.number(source, "partial_rotary_factor", 1.0)) != 1.0:
            raise QADError(f"{values.place(source)}: partial_rotary_factor {factor} is not supported. Expected 1.0.")
    if rope.get("mrope_section") is not None:
        raise QADError(
            f"{values.place(rope)}: mrope_section {rope['mrope_section']!r:.100} is not supported. Expected positions "
            "of text."
        )


def _original_length(config: dict, rope: values.Section) -> int:
    """Return the context length before scaling: from either place, else the context length as in transformers."""
    inner, outer = (values.integer(source, _ORIGINAL, None, maximum=values.MAX_POSITIONS) for source in (rope, config))
    if inner and outer and inner != outer:
        raise QADError(
            f"{values.place(rope)}: {_ORIGINAL} is {inner}, but {outer} at the top level, and loaders disagree which "
            "one counts. Remove the wrong one."
        )
    found = inner or outer or values.integer(config, "max_position_embeddings", None, maximum=values.MAX_POSITIONS)
    if found is None:
        raise QADError(f"{values.place(rope)}: no {_ORIGINAL!r}, which llama3 scaling requires.")
    return found
