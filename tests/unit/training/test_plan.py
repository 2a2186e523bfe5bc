"""The dry run's count of a rank's parameters where experts are spread over ranks."""

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_qad.engine import prepare

prepare()
from megatron_qad.models.families import family_of  # noqa: E402
from megatron_qad.training.plan import _largest_stage  # noqa: E402

CONFIG = json.loads((Path(__file__).parents[1] / "quantization/configs/nemotron-3-nano-30b-a3b.json").read_text())


@pytest.mark.parametrize(("tp", "ep", "etp"), [(1, 1, 1), (1, 8, 1), (2, 4, 2), (2, 8, 1)])
def test_experts_are_divided_by_their_own_parallelism(tp, ep, etp):
    family = family_of(CONFIG)
    tensors, pattern = family.tensors(CONFIG), family.layer_pattern(CONFIG)
    sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep, "expert_tensor_parallel_size": etp}
    args = Namespace(**sizes, pipeline_model_parallel_size=1, untie_embeddings_and_output_weights=True)
    dense, experts = _largest_stage(args, tensors, pattern)
    routed = 23 * 128 * 2 * 2688 * 1856
    assert experts == routed // (ep * etp)
    whole = sum(math.prod(t.shape) for t in tensors if t.kind in ("norm", "router"))
    rest = sum(math.prod(t.shape) for t in tensors) - routed - whole
    assert dense == whole + rest // tp
