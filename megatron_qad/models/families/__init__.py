"""One file a family: its Hugging Face config as Megatron arguments, its weights' names on both sides, what is never
quantized. ``dense_decoder`` and ``router_options`` hold what several families share. Needs no Megatron."""

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
"""By the entry ``architectures`` of config.json."""


def family_of(hf_config: dict) -> Family:
    """The family of a Hugging Face ``config.json``, by its ``architectures`` entry.

    Raises:
        QADError: the architecture is not supported; the message lists those that are.
    """
    found = hf_config.get("architectures") or ["(no architectures entry)"]
    for architecture in found:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    raise QADError(
        f"config.json names the architecture {found[0]!r}, which is not supported. Supported: "
        f"{', '.join(sorted(FAMILIES))}"
    )


def text_config(hf_config: dict) -> dict:
    """The config of the language model that Megatron builds: ``hf_config`` itself, or what a wrapper's holds."""
    return family_of(hf_config).text_config(hf_config)
