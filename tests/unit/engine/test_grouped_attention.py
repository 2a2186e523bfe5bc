"""Grouped attention equals transformers' attention on padded batches, in one pass and in steps with a cache."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

from megatron_qad.engine.cpu.speedups.grouped_attention import NAME, register

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2}


def make(family):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2)).eval()
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2}
    return NemotronHForCausalLM(NemotronHConfig(**SIZES, **mamba, hybrid_override_pattern="M*M*")).eval()


@pytest.mark.parametrize("family", ["llama", "nemotron_h"])
@pytest.mark.parametrize("padding", [0, 3])
@torch.inference_mode()
def test_logits_equal_transformers(family, padding):
    model = make(family)
    assert model.config._attn_implementation == "sdpa"
    tokens = torch.randint(0, 64, (3, 12))
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0

    def logits():
        whole = model(tokens, attention_mask=mask).logits
        prompt = model(tokens[:, :11], attention_mask=mask[:, :11], use_cache=True)
        step = model(tokens[:, 11:], attention_mask=mask, past_key_values=prompt.past_key_values, use_cache=True)
        return whole[mask.bool()], step.logits

    expected = logits()
    model.set_attn_implementation(register())
    assert model.config._attn_implementation == NAME
    for actual, value in zip(logits(), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)  # float32, sums in another order
