"""Parameters, scales and input moments on each rank, with expert and pipeline parallelism."""

import json
from pathlib import Path

import pytest
from tiny_configs import TINY_LLAMA, TINY_OF_FAMILY

from megatron_qad.models.families import family_of
from megatron_qad.planning.layer_sizes import PlannedModel
from megatron_qad.planning.layout import Layout
from megatron_qad.planning.static_bytes import ModelParams, RankNumel, ScaleBytes, training_state
from megatron_qad.quantization.scale_settings import ScaleSetting

CONFIG = json.loads((Path(__file__).parents[1] / "quantization/configs/nemotron-3-nano-30b-a3b.json").read_text())
NANO = PlannedModel(family_of(CONFIG), CONFIG)
PARAMETERS = 31_577_940_288
"""Number of parameters of the published checkpoint."""
EXPERTS = 23 * 128 * 2 * 2688 * 1856
"""Parameters in experts: 23 layers of 128 experts with two linears each."""


@pytest.mark.parametrize(("tp", "ep", "etp", "num_shards"), [(1, 1, 1, 1), (1, 8, 1, 8), (2, 4, 2, 8), (2, 8, 1, 8)])
def test_experts_are_divided_by_expert_parallelism(tp, ep, etp, num_shards):
    params = ModelParams(NANO)
    (rank,) = params.on_ranks(Layout(tp=tp, ep=ep, etp=etp))
    assert params.total == PARAMETERS and rank.experts * num_shards == EXPERTS
    # Norms and routers, 0.4 % of the other parameters, are replicated on every tensor-parallel rank.
    assert 0 <= rank.dense * tp - (PARAMETERS - EXPERTS) <= 0.005 * (tp - 1) * (PARAMETERS - EXPERTS)


@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (8, 1), (4, 2)])
def test_input_moments_of_experts(ep, etp):
    """64 bytes for each input column of each expert. Expert tensor parallelism splits those of the second."""
    experts = [linear.megatron for linear in NANO.family.linears(CONFIG) if linear.kind == "expert"]
    scales = dict.fromkeys(experts, ScaleSetting("local_hessian", "frozen"))
    sizes = ScaleBytes(NANO, dict.fromkeys(experts, "nvfp4"), scales)
    (moments,) = sizes.moments(Layout(tp=etp, ep=ep, etp=etp))
    assert moments == 23 * 128 // ep * (2688 + 1856 // etp) * 64
    (frozen,) = sizes.frozen(Layout(tp=etp, ep=ep, etp=etp))  # a byte for 16 weights, and four for each expert's amax
    assert frozen == (EXPERTS // 16 + 23 * 128 * 2 * 4) // (ep * etp)


def test_stages_hold_all_parameters():
    model = PlannedModel(family_of(TINY_LLAMA), TINY_LLAMA)
    params = ModelParams(model)
    ranks = params.on_ranks(Layout(pp=2))
    assert sum(rank.total for rank in ranks) == params.total
    tied = TINY_OF_FAMILY["qwen2"]
    params = ModelParams(PlannedModel(family_of(tied), tied))
    copy = tied["vocab_size"] * tied["hidden_size"]
    assert sum(rank.total for rank in params.on_ranks(Layout(pp=2))) == params.total + copy
    assert params.on_ranks(Layout())[0].total == params.total


def test_offloaded_model_holds_two_layers():
    params = ModelParams(PlannedModel(family_of(TINY_LLAMA), TINY_LLAMA))
    outside = 2 * 101 * 64 + 64
    mlp = 64 + 3 * 64 * 96  # the norm, gate, up and down: larger than an attention layer
    attention = 64 + 64 * (128 + 2 * 64) + 128 * 64
    assert params.offloaded(Layout()) == outside + 2 * max(mlp, attention)


def test_distributed_optimizer_divides_the_state():
    """The data- and context-parallel ranks share dense state; the ranks with the same experts share that of experts."""
    params = RankNumel(dense=1600, experts=800)
    layout = Layout(tp=2, dp=4, cp=2, ep=4, etp=1, distributed_optimizer=True, gradient_bytes=4)
    assert training_state(params, layout) == {"gradients": 9600, "optimizer state": 1600 * 12 // 8 + 800 * 12 // 4}
    float32 = Layout(element_bytes=4, gradient_bytes=4)
    assert training_state(params, float32)["optimizer state"] == 2400 * 8
