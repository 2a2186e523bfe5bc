"""Model families, one file each: Megatron arguments from the Hugging Face config, weight names on both sides, and
weights that are never quantized. ``dense_decoder`` and ``router_options`` have the shared parts. Needs no Megatron."""

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import (
    decilm,
    llama,
    llama_nemotron_vl,
    nemotron_h,
    nemotron_vl,
    qwen2,
    qwen3,
    qwen3_moe,
)
from megatron_qad.models.families.base import Family
from megatron_qad.models.families.nearest import refusal

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        llama.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        qwen3_moe.FAMILY,
        nemotron_h.FAMILY,
        nemotron_vl.FAMILY,
        llama_nemotron_vl.FAMILY,
        decilm.FAMILY,
    )
}
"""Families by their entry in ``architectures`` of config.json."""


def family_of(hf_config: dict) -> Family:
    """Return the family of a Hugging Face ``config.json`` by its ``architectures`` entry.

    Raises:
        QADError: no architecture, several of them, one that is not supported (the message names the nearest family and
            what is not built), or a ``model_type`` of another family.

    Example::

        config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
        family_of(config).architecture  # "LlamaForCausalLM"
        family_of(config).layer_pattern(config)  # "*-*-"
    """
    architectures = values.items(hf_config, "architectures", str, [])
    if len(architectures) > 1:
        raise QADError(
            f"{values.place(hf_config)}: architectures has {', '.join(architectures):.200}. Expected one: loaders "
            "disagree which one counts. Remove the others."
        )
    architecture = architectures[0] if architectures else "(no entry)"
    # A model without a head, as AutoModel saves it, is LlamaModel.
    full = architecture.removesuffix("Model") + "ForCausalLM" if architecture.endswith("Model") else architecture
    if full not in FAMILIES:
        raise refusal(hf_config, architecture, FAMILIES.values())
    family = FAMILIES[full]
    if (model_type := values.text(hf_config, "model_type", family.model_type)) != family.model_type:
        raise QADError(
            f"{values.place(hf_config)}: architectures is {family.architecture}, but model_type is "
            f"{model_type!r:.100}, expected {family.model_type!r}. Correct the wrong one."
        )
    return family


def text_config(hf_config: dict) -> dict:
    """Return the config of the language model that Megatron builds: ``hf_config`` or, in a wrapper, a part of it."""
    return family_of(hf_config).text_config(hf_config)
