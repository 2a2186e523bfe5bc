"""Expected tensors of Nemotron Nano VL: a Nemotron-H model, and a vision encoder passed through unchanged."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors import nemotron_h
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory
from megatron_qad.engine.errors import QADError


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    inner = config.get("llm_config") or config.get("text_config")
    if not isinstance(inner, dict):
        raise QADError(f"config.json: llm_config is {inner!r:.100}, expected the language model's config.")
    model = nemotron_h.expected_tensors(inner, "language_model.")
    model.required = ("vision_model.", "mlp1.")
    model.passthrough_prefixes += model.required
    return model
