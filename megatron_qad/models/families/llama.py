"""Llama and models of the same architecture (``LlamaForCausalLM``)."""

from megatron_qad.models.families import dense_decoder

FAMILY = dense_decoder.family("LlamaForCausalLM", "llama")
