"""The cache that generation writes into against transformers' own: the same keys and values, seldom moved."""

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
    places = []
    for place in range(PROMPT, LENGTH):
        outputs.append(model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
        places.append([layer.keys.data_ptr() for layer in cache.layers if isinstance(layer, PreallocatedLayer)])
    return torch.cat(outputs, dim=1), places


@pytest.mark.parametrize(("family", "num_roomy"), [("llama", 2), ("nemotron_h", 2), ("sliding", 0)])
@torch.inference_mode()
def test_logits_equal_those_of_transformers_cache(family, num_roomy, monkeypatch):
    monkeypatch.setattr(module, "ROOM", 3)
    model = make(family)
    tokens = torch.randint(0, 64, (3, LENGTH))
    expected, _ = logits_in_steps(model, tokens, DynamicCache(config=model.config))
    cache = preallocated_cache(model.config)
    found, places = logits_in_steps(model, tokens, cache)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == LENGTH
    assert len(places[0]) == num_roomy
    # Five tokens and room for three; the sixth to eighth stay there, the ninth moves all, to room for twelve.
    assert all(where == places[0] for where in places[:3]) and all(where == places[3] for where in places[3:])
    assert family == "sliding" or places[2] != places[3]
