"""Expected tensors of Llama, with optional attention and MLP biases."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors.dense_decoder import dense_decoder
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory, is_set


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    bias = is_set(config, "attention_bias")
    return dense_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=is_set(config, "mlp_bias"), qk_norm=False)
