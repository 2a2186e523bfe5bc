"""Qwen3, dense: Llama with norms of queries and keys."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors.dense_decoder import dense_decoder
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory


def expected_tensors(config: dict[str, Any]) -> Inventory:
    bias = bool(config.get("attention_bias", False))
    return dense_decoder(
        config, qkv_bias=bias, o_bias=bias, mlp_bias=False, qk_norm=True, head_dim=128
    )  # 128: its config's default
