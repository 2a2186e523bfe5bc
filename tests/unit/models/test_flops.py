"""The FLOPs of a forward pass, against counts by hand; test_flop_counts.py compares them with torch's counter."""

import pytest
from tiny_configs import TINY_HYBRID, TINY_LLAMA, TINY_OF_FAMILY

from megatron_qad.models.families import family_of
from megatron_qad.models.flops import forward_flops


def flops_of(config):
    return forward_flops(family_of(config), config)


def test_dense_model():
    """Three blocks: q, k, v, o; gate, up, down. The head has 101 rows, and attention 4 heads of 32."""
    block = 64 * (4 * 32 + 2 * 2 * 32) + 4 * 32 * 64 + 3 * 64 * 96
    model = flops_of(TINY_LLAMA)
    assert model.per_token == 2 * (3 * block + 101 * 64)
    assert model.per_pair == 3 * 4 * (4 * 32)
    assert model.of([7]) == 7 * model.per_token + 28 * model.per_pair
    # Documents of a packed row do not attend to each other.
    assert model.of([3, 4]) == 7 * model.per_token + (6 + 10) * model.per_pair


def test_hybrid_model_with_experts():
    """Pattern ME*-M; one of the three routed experts per token, and a shared expert of width 80."""
    config = TINY_OF_FAMILY["nemotron_h"] | {"num_experts_per_tok": 2}
    inner, state = 4 * 16, 2 * 16
    projections = 32 * (2 * inner + 2 * state + 4) + inner * 32
    mamba = 2 * projections + 2 * 4 * (inner + 2 * state) + 4 * inner * 16
    experts = 2 * (2 * 2 * 32 * 16 + 2 * 32 * 80 + 3 * 32)
    attention, mlp = 2 * (32 * (4 + 2 * 2) * 8 + 4 * 8 * 32), 2 * 2 * 32 * 48
    model = flops_of(config)
    assert model.per_token == 2 * mamba + experts + attention + mlp + 2 * 96 * 32
    assert model.per_pair == 4 * 4 * 8
    assert flops_of(config | {"num_experts_per_tok": 3}).per_token - model.per_token == 2 * 2 * 32 * 16


@pytest.mark.parametrize("name", TINY_OF_FAMILY)
def test_every_family_is_counted(name):
    config = TINY_OF_FAMILY[name] | ({"num_experts_per_tok": 2} if name == "nemotron_h" else {})
    if name == "nemotron_vl":
        config = config | {"llm_config": TINY_HYBRID | {"model_type": "nemotron_h", "num_experts_per_tok": 2}}
    model = flops_of(config)
    assert model.per_token > 0 and model.per_pair > 0
    tied = config | {"tie_word_embeddings": True}
    assert flops_of(tied).per_token == model.per_token, "a tied head is computed, too"
