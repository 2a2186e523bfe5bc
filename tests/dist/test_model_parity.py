"""Imported models have the logits of transformers for all families and parallelism (float32, CPU)."""

import math

import pytest
import tiny_models
from made_models import PARALLELISM

# float32 has 24 bits (6e-8). Logits are of order one; sums of up to 200 products in three blocks are in another order
# than in transformers: 3e-6 to 6e-6 here. A wrong rope, norm, bias or head order changes logits by 1e-2.
TOLERANCE = 2e-5


@pytest.mark.parametrize("parallelism", PARALLELISM)
@pytest.mark.parametrize("case", tiny_models.CASES)
def test_logits_equal_transformers(made, case, parallelism):
    (result,) = [r for r in made.logits if (r["case"], r["parallelism"]) == (case, parallelism)]
    assert result["error"] <= TOLERANCE, result
    assert result["sequence_parallel"] == ("--sequence-parallel" in PARALLELISM[parallelism][1])
    assert result["std"] > 0.3, "logits too flat to tell models apart"
    assert result["padded_vocab"] > tiny_models.config_of(case).vocab_size, "no vocabulary padding to drop"


def test_cases_cover_the_variants():
    configs = {case: tiny_models.config_of(case) for case in tiny_models.CASES}
    assert any(c.num_key_value_heads < c.num_attention_heads for c in configs.values())
    assert any(c.num_key_value_heads == c.num_attention_heads for c in configs.values())
    assert any(c.num_hidden_layers % 2 for c in configs.values()), "no stage boundary inside a block"
    for case in ("qwen3", "qwen3-tied"):
        assert configs[case].head_dim != configs[case].hidden_size // configs[case].num_attention_heads
    for case in ("llama3-rope", "llama3-rope-tied"):
        rope, dim = configs[case].rope_parameters, configs[case].head_dim
        original = rope["original_max_position_embeddings"]
        assert tiny_models.SEQ_LENGTH > original
        turns = [original / (2 * math.pi * rope["rope_theta"] ** (i / dim)) for i in range(0, dim, 2)]
        kept = sum(t > rope["high_freq_factor"] for t in turns)
        stretched = sum(t < rope["low_freq_factor"] for t in turns)
        assert kept and stretched and kept + stretched < len(turns), "a frequency range is not reached"
