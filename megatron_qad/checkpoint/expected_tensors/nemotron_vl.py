"""Expected tensors of Nemotron Nano VL: a Nemotron-H model and a vision encoder."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors import nemotron_h
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory
from megatron_qad.checkpoint.expected_tensors.radio_vision import add_vision, language_config


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    model = nemotron_h.expected_tensors(language_config(config), "language_model.")
    add_vision(model, config, projector_bias=False)
    return model
