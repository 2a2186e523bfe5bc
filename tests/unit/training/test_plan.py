"""Parameters and input moments per rank in the plan of a dry run with expert parallelism."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_qad.engine import init_runtime

init_runtime()
from megatron_qad.models.families import family_of  # noqa: E402
from megatron_qad.quantization.scale_settings import ScaleSetting  # noqa: E402
from megatron_qad.training.plan import _largest_stage, _moments_bytes  # noqa: E402

CONFIG = json.loads((Path(__file__).parents[1] / "quantization/configs/nemotron-3-nano-30b-a3b.json").read_text())


PARAMETERS = 31_577_940_288
"""Number of parameters of the published checkpoint."""
EXPERTS = 23 * 128 * 2 * 2688 * 1856
"""Parameters in experts: 23 layers of 128 experts with two linears each."""


@pytest.mark.parametrize(("tp", "ep", "etp", "num_shards"), [(1, 1, 1, 1), (1, 8, 1, 8), (2, 4, 2, 8), (2, 8, 1, 8)])
def test_experts_are_divided_by_expert_parallelism(tp, ep, etp, num_shards):
    family = family_of(CONFIG)
    sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    args = Namespace(**sizes, pipeline_model_parallel_size=1, untie_embeddings_and_output_weights=True)
    dense, experts = _largest_stage(args, family.tensors(CONFIG), family.layer_pattern(CONFIG))
    assert experts * num_shards == EXPERTS
    # Norms and routers, 0.4 % of the other parameters, are replicated on every tensor-parallel rank.
    assert 0 <= dense * tp - (PARAMETERS - EXPERTS) <= 0.005 * (tp - 1) * (PARAMETERS - EXPERTS)


@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (8, 1), (4, 2)])
def test_input_moments_of_experts(ep, etp):
    """64 bytes for each input column of each expert. Expert tensor parallelism splits those of the second."""
    family = family_of(CONFIG)
    setting = ScaleSetting("local_hessian", "frozen")
    scales = {linear.megatron: setting for linear in family.linears(CONFIG) if linear.kind == "expert"}
    config = Namespace(scales=scales, student=Namespace(family=family, hf=CONFIG))
    sizes = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp, "tensor_model_parallel_size": etp}
    args = Namespace(**sizes, pipeline_model_parallel_size=1, hybrid_layer_pattern=family.layer_pattern(CONFIG))
    assert _moments_bytes(config, args) == 23 * 128 // ep * (2688 + 1856 // etp) * 64
