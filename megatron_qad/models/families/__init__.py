"""One file a family: its Hugging Face config as Megatron arguments, its weights' names on both sides."""

from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import decilm, dense, nemotron_h, nemotron_vl, qwen3_moe
from megatron_qad.models.families.base import Family

_FAMILIES = {
    family.architecture: family
    for family in (
        dense.LLAMA,
        dense.QWEN2,
        dense.QWEN3,
        qwen3_moe.QWEN3_MOE,
        nemotron_h.NEMOTRON_H,
        nemotron_vl.NEMOTRON_VL,
        decilm.DECILM,
    )
}


def family_of(hf_config: dict) -> Family:
    """The family of a Hugging Face ``config.json``, by its ``architectures`` entry.

    Raises:
        QADError: the architecture is not supported; the message lists those that are.
    """
    found = hf_config.get("architectures") or ["(no architectures entry)"]
    for architecture in found:
        if architecture in _FAMILIES:
            return _FAMILIES[architecture]
    raise QADError(
        f"config.json names the architecture {found[0]!r}, which is not supported. Supported: "
        f"{', '.join(sorted(_FAMILIES))}"
    )


def text_config(hf_config: dict) -> dict:
    """The config of the language model that Megatron builds: ``hf_config`` itself, or what a wrapper's holds."""
    return family_of(hf_config).text_config(hf_config)
