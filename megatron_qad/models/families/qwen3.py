"""Qwen3, dense (``Qwen3ForCausalLM``): Llama with norms of queries and keys."""

from megatron_qad.models.families import dense_decoder

FAMILY = dense_decoder.family(
    "Qwen3ForCausalLM", "qwen3", qk_norm=True, defaults=dense_decoder.QWEN_DEFAULTS | {"head_dim": 128}
)
