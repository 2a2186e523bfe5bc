"""Expected tensors of dense Qwen3: Llama with norms on queries and keys."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors.dense_decoder import dense_decoder
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    bias = bool(config.get("attention_bias", False))
    # head_dim 128 is the default of Qwen3's config class.
    return dense_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=False, qk_norm=True, head_dim=128)
