"""Model families, one file each: Megatron arguments from the Hugging Face config, weight names on both sides, and
weights that are never quantized. ``dense_decoder`` and ``router_options`` have the shared parts. Needs no Megatron."""

from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import decilm, llama, nemotron_h, nemotron_vl, qwen2, qwen3, qwen3_moe
from megatron_qad.models.families.base import Family

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        llama.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        qwen3_moe.FAMILY,
        nemotron_h.FAMILY,
        nemotron_vl.FAMILY,
        decilm.FAMILY,
    )
}
"""Families by their entry in ``architectures`` of config.json."""


def family_of(hf_config: dict) -> Family:
    """Return the family of a Hugging Face ``config.json`` by its ``architectures`` entry.

    Raises:
        QADError: the architecture is not supported. The message lists the supported ones.

    Example::

        config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
        family_of(config).architecture  # "LlamaForCausalLM"
        family_of(config).layer_pattern(config)  # "*-*-"
    """
    architectures = hf_config.get("architectures") or ["(no architectures entry)"]
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
        if str(architecture).endswith("Model"):  # a model without a head, as AutoModel saves it
            base = str(architecture).removesuffix("Model")
            if (full := f"{base}ForCausalLM") in FAMILIES:
                return FAMILIES[full]
    raise QADError(
        f"config.json: architecture {architectures[0]!r} is not supported. Supported: {', '.join(sorted(FAMILIES))}."
    )


def text_config(hf_config: dict) -> dict:
    """Return the config of the language model that Megatron builds: ``hf_config`` or, in a wrapper, a part of it."""
    return family_of(hf_config).text_config(hf_config)
