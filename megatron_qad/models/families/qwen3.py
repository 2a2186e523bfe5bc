"""Qwen3, dense (``Qwen3ForCausalLM``): Llama with norms of queries and keys."""

from megatron_qad.models.families import dense_decoder

FAMILY = dense_decoder.family("Qwen3ForCausalLM", qk_norm=True)
