"""Llama and what has its shape (``LlamaForCausalLM``)."""

from megatron_qad.models.families import dense_decoder

FAMILY = dense_decoder.family("LlamaForCausalLM")
