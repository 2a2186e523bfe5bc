"""Expected tensors of Llama, with optional attention and MLP biases."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors.dense_decoder import dense_decoder
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    bias = bool(config.get("attention_bias", False))
    return dense_decoder(
        config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)), qk_norm=False
    )
