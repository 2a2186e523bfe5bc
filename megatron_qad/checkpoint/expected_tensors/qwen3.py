"""Expected tensors of dense Qwen3: Llama with norms on queries and keys."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors.dense_decoder import dense_decoder
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory, is_set


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    bias = is_set(config, "attention_bias")
    config = {"num_key_value_heads": 32, "head_dim": 128} | config  # defaults of Qwen3's config class
    return dense_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=False, qk_norm=True)
