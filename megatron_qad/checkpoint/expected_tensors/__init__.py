"""Expected contents of a Hugging Face checkpoint, from its config.json alone: tensors, linears and fused groups.

There is one file per model family, named as in ``models.families``. The files are written independently of the name
maps in ``models`` and do not import them, so that the validator does not repeat a mistake of the exporter.
"""

from collections.abc import Callable
from typing import Any

from megatron_qad.checkpoint.expected_tensors import (
    decilm,
    llama,
    llama_nemotron_vl,
    nemotron_h,
    nemotron_vl,
    qwen2,
    qwen3,
    qwen3_moe,
)
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory
from megatron_qad.engine.errors import QADError

EXPECTED_TENSORS: dict[str, Callable[[dict[str, Any]], Inventory]] = {
    "llama": llama.expected_tensors,
    "qwen2": qwen2.expected_tensors,
    "qwen3": qwen3.expected_tensors,
    "qwen3_moe": qwen3_moe.expected_tensors,
    "nemotron_h": nemotron_h.expected_tensors,
    "nemotron-nas": decilm.expected_tensors,
    "NemotronH_Nano_VL_V2": nemotron_vl.expected_tensors,
    "Llama_Nemotron_Nano_VL": llama_nemotron_vl.expected_tensors,
}
"""Functions that return the inventory, by ``model_type`` of config.json."""


def inventory(config: dict[str, Any]) -> Inventory:
    """Return the inventory of the model described by ``config`` (config.json).

    Raises:
        QADError: an unsupported family, or a missing or invalid entry.
    """
    model_type = config.get("model_type")
    if model_type not in tuple(EXPECTED_TENSORS):  # a tuple, because a damaged file may hold an unhashable value
        supported = ", ".join(sorted(EXPECTED_TENSORS))
        raise QADError(
            f"config.json: model_type is {model_type!r:.100}, expected one of {supported}. "
            "docs/howto/add_a_family.md explains how to add a family."
        )
    return EXPECTED_TENSORS[model_type](config)
