"""What a Hugging Face checkpoint must hold, from its config.json alone: tensors with shapes, linears, fused groups.

One file a family, under the name that the family has in ``models.families``.
Written down independently of the name maps in ``models``, so that the validator does not repeat an exporter's mistake:
nothing here imports ``models``.
"""

from collections.abc import Callable
from typing import Any

from megatron_qad.checkpoint.expected_tensors import decilm, llama, nemotron_h, nemotron_vl, qwen2, qwen3, qwen3_moe
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
}
"""By the entry ``model_type`` of config.json."""


def inventory(config: dict[str, Any]) -> Inventory:
    """The inventory of the model that ``config`` (config.json) describes.

    Raises QADError for an unsupported family, listing those supported, and for a missing or senseless entry.
    """
    model_type = config.get("model_type")
    if model_type not in tuple(EXPECTED_TENSORS):  # a tuple, because a damaged file may hold an unhashable value
        known = ", ".join(sorted(EXPECTED_TENSORS))
        raise QADError(
            f"config.json: model_type is {model_type!r}; the inventory is known for {known}. "
            "docs/howto/add_a_family.md says how to add one."
        )
    return EXPECTED_TENSORS[model_type](config)
