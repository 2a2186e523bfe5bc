"""Expected tensors of Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors.dense_decoder import dense_decoder
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    # 32 key-value heads are the default of Qwen2's config class.
    return dense_decoder(
        {"num_key_value_heads": 32} | config, qkv_bias=True, o_bias=False, mlp_bias=False, qk_norm=False
    )
