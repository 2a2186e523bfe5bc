"""Qwen2 and Qwen2.5 (``Qwen2ForCausalLM``): Llama with QKV biases."""

from megatron_qad.models.families import dense_decoder

FAMILY = dense_decoder.family("Qwen2ForCausalLM", "qwen2", qkv_bias=True, defaults=dense_decoder.QWEN_DEFAULTS)
