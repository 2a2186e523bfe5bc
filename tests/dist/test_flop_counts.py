"""The FLOPs of a config equal what torch counts in the layers of the local spec, except for known terms."""

import json

import pytest
import tiny_job
from tiny_configs import TINY_HYBRID, TINY_OF_FAMILY

from megatron_qad.models.families import family_of
from megatron_qad.models.flops import BACKWARD, forward_flops

ROWS, LENGTH, CHUNK = 2, 24, 128
LAYERS = {"vocab_size": 128, "max_position_embeddings": 64}  # no padding of the vocabulary
CONFIGS = {
    "dense": tiny_job.LLAMA | LAYERS,
    "hybrid": TINY_HYBRID | LAYERS | {"num_experts_per_tok": 2},
    "experts": TINY_OF_FAMILY["qwen3_moe"] | LAYERS,
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("flops")
    for name, config in CONFIGS.items():
        tiny_job.write_hf(directory / f"hf_{name}", config)
    models = [(f"{directory}/hf_{name}", f"{directory}/{name}", "float32") for name in CONFIGS]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    arguments = {"checkpoints": [f"{directory}/{name}" for name in CONFIGS], "rows": ROWS, "length": LENGTH}
    server.run("flop_jobs:count", 1, arguments | {"result": f"{directory}/counts.json"})
    return dict(zip(CONFIGS, json.loads((directory / "counts.json").read_text()), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_pass(counts, name):
    """No tolerance: both are sums of products. The counter's terms that no model needs are added to ours."""
    config, num_tokens = CONFIGS[name], ROWS * LENGTH
    model = forward_flops(family_of(config), config)
    masked_scores = model.per_pair * (ROWS * LENGTH**2 - ROWS * LENGTH * (LENGTH + 1) // 2)
    chunks = convolution = 0
    if name == "hybrid":
        # The scan computes all pairs of a chunk, which is the whole row here: C B^T and the product with x. The
        # convolution is a sum of elementwise products, which the counter ignores.
        heads, num_mamba = config["mamba_num_heads"], config["hybrid_override_pattern"].count("M")
        pairs = ROWS * min(LENGTH, CHUNK) * LENGTH
        chunks = num_mamba * 2 * pairs * heads * (config["ssm_state_size"] + config["mamba_head_dim"])
        channels = heads * config["mamba_head_dim"] + 2 * config["n_groups"] * config["ssm_state_size"]
        convolution = num_mamba * num_tokens * 2 * channels * config["conv_kernel"]
    assert counts[name][0] == model.of([LENGTH] * ROWS) + masked_scores + chunks - convolution


@pytest.mark.parametrize("name", CONFIGS)
def test_backward_pass(counts, name):
    """Two products for each of the forward pass. Attention computes its scores again: half a forward pass more."""
    forward, both = counts[name]
    config = CONFIGS[name]
    scores = forward_flops(family_of(config), config).per_pair * ROWS * LENGTH**2
    unused = 0
    if name == "hybrid":
        # With one chunk, the first state is zero (no gradient of it) and the last one is not used (none of x and B).
        inner, num_mamba = config["mamba_num_heads"] * config["mamba_head_dim"], 2
        unused = 3 * num_mamba * 2 * ROWS * LENGTH * inner * config["ssm_state_size"]
    assert both == (1 + BACKWARD) * forward + scores // 2 - unused
