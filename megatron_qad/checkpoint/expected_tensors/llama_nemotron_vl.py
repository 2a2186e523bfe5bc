"""Expected tensors of Llama Nemotron Nano VL: a Llama model and a vision encoder."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors import llama
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory
from megatron_qad.checkpoint.expected_tensors.radio_vision import add_vision, language_config


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    model = llama.expected_tensors(language_config(config)).prefixed("language_model.")
    add_vision(model, config, projector_bias=True)
    return model
