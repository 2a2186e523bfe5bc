"""The preallocated cache gives the same logits as transformers' own cache and seldom moves its memory."""

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from megatron_qad.engine.cpu.speedups import preallocated_kv_cache as module
from megatron_qad.engine.cpu.speedups.preallocated_kv_cache import PreallocatedLayer, preallocated_cache

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
SIZES |= {"num_key_value_heads": 2}
LENGTH, PROMPT = 12, 5


def make(family):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2)).eval()
    if family == "sliding":
        return MistralForCausalLM(MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=4)).eval()
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2}
    return NemotronHForCausalLM(NemotronHConfig(**SIZES, **mamba, hybrid_override_pattern="M*M*")).eval()


def logits_in_steps(model, tokens, cache):
    outputs = [model(tokens[:, :PROMPT], past_key_values=cache, use_cache=True).logits]
    addresses = []
    for position in range(PROMPT, LENGTH):
        outputs.append(model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
        addresses.append([layer.keys.data_ptr() for layer in cache.layers if isinstance(layer, PreallocatedLayer)])
    return torch.cat(outputs, dim=1), addresses


@pytest.mark.parametrize(("family", "num_preallocated"), [("llama", 2), ("nemotron_h", 2), ("sliding", 0)])
@torch.inference_mode()
def test_logits_equal_those_of_transformers_cache(family, num_preallocated, monkeypatch):
    monkeypatch.setattr(module, "ROOM", 3)
    model = make(family)
    tokens = torch.randint(0, 64, (3, LENGTH))
    expected, _ = logits_in_steps(model, tokens, DynamicCache(config=model.config))
    cache = preallocated_cache(model.config)
    logits, addresses = logits_in_steps(model, tokens, cache)
    assert torch.equal(logits, expected)
    assert cache.get_seq_length() == LENGTH
    assert len(addresses[0]) == num_preallocated
    # Five tokens and room for three: the sixth to eighth fit, the ninth moves all to memory for twelve.
    assert all(a == addresses[0] for a in addresses[:3]) and all(a == addresses[3] for a in addresses[3:])
    assert family == "sliding" or addresses[2] != addresses[3]
