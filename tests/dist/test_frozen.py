"""Frozen scales in jobs: the same under any parallelism, after a resume, in the gradient, and in exported files.

The models have every way in which Megatron stores a weight: gate and up as halves, q, k and v in groups, the parts of a
Mamba projection, and experts of one parameter, with and without gates.
"""

from pathlib import Path

import pytest
import tiny_hybrids
import tiny_job
import torch
from safetensors.torch import load_file
from test_training import TOLERANCE, Workshop

from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine.run_directory import json_records
from megatron_qad.formats import nvfp4
from megatron_qad.formats.nvfp4_format import NVFP4
from megatron_qad.models.families import family_of
from megatron_qad.quantization.carried_scales import AMAX, BLOCK_SCALES, stored_name

MODELS = {"gated": tiny_hybrids.QWEN3_MOE, "squared": tiny_hybrids.NEMOTRON_H, "dense": tiny_job.LLAMA}
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
EP2 = ["--expert-model-parallel-size", "2"]
PARALLELISM = {"one": (1, []), "tp2": (2, TP2), "pp2": (2, PP2), "ep2": (2, EP2), "tp2ep2": (4, TP2 + EP2)}
KINDS = ("attention", "mamba", "mlp", "expert", "shared_expert")
FROZEN = "four_over_six:frozen"
NUM_STEPS = 3


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("frozen")
    models = []
    for name, config in MODELS.items():
        for role, noise in (("teacher", 0.0), ("student", 0.3)):
            source = tiny_job.write_hf(directory / f"hf_{name}_{role}", config, noise=noise)
            models.append((str(source), f"{directory}/{name}_{role}", "float32"))
    for role in ("teacher", "student"):
        models.append((f"{directory}/hf_dense_{role}", f"{directory}/bf16_{role}", "bfloat16"))
    tiny_job.write_data(directory / "data", vocab_size=120)
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Workshop(directory, server)


def policy(directory: Path, kinds=KINDS, scales: str = "four_over_six", update: str = "frozen") -> str:
    """Write a policy in which weights of all layers are NVFP4 and inputs are not quantized."""
    file = directory / "policy.yaml"
    file.write_text(
        f"rules:\n- {{kind: [{', '.join(kinds)}], format: nvfp4-w4a16, scales: {scales}, update: {update}}}\n"
        "- {kind: head, format: bf16}\n"
    )
    return str(file)


def stored(workshop, *runs: Path) -> list[dict[str, torch.Tensor]]:
    """Return all tensors of the newest checkpoint of each run, as one process would have stored them."""
    result = workshop.directory / "tensors.pt"
    workshop.server.run("ptq_jobs:tensors", 1, {"checkpoints": list(map(str, runs)), "result": str(result)})
    return torch.load(result)


SLOW = [("gated", "pp2"), ("squared", "ep2"), ("gated", "tp2ep2"), ("dense", "tp2")]
CASES = [
    ("gated", "ep2"),
    ("squared", "tp2"),
    ("squared", "pp2"),
    *(pytest.param(*c, marks=pytest.mark.all) for c in SLOW),
]


@pytest.mark.parametrize("model, parallelism", CASES)
def test_scales_do_not_depend_on_parallelism(workshop, model, parallelism):
    """After three steps all scales of a run equal those of one process bit for bit, and the weights nearly."""
    expected_run, run = workshop.directory / f"{model}-one", workshop.directory / f"{model}-{parallelism}"
    argv = workshop.argv("--qad-policy", policy(workshop.directory), kind=model, num_steps=NUM_STEPS)
    if not expected_run.exists():
        workshop.train([*argv, "--save", str(expected_run)], whole=False)
    nproc, flags = PARALLELISM[parallelism]
    workshop.train([*argv, *flags, "--save", str(run)], nproc, whole=False)
    expected, actual = stored(workshop, expected_run, run)
    assert actual.keys() == expected.keys()
    config = MODELS[model]
    linears = [m for m in family_of(config).linears(config) if m.kind in KINDS]
    scales = [name for name in expected if BLOCK_SCALES in name]
    assert len([name for name in expected if AMAX in name]) == len(linears) and len(scales) >= len(linears)
    for name, tensor in expected.items():
        if AMAX in name or BLOCK_SCALES in name:
            assert tensor.dtype == (torch.uint8 if BLOCK_SCALES in name else torch.float32)
            assert torch.equal(actual[name], tensor), name
        elif name.startswith("decoder."):
            # Adam's first steps have nearly the size of the learning rate, whatever the gradient is: where a gradient is
            # near zero, other partial sums change its sign.
            assert (actual[name] - tensor).abs().max() <= 2 * NUM_STEPS * 1e-3, name
    followed = [
        linear.megatron
        for linear in linears
        if linear.megatron in expected
        and expected[stored_name(linear.megatron, AMAX)] == nvfp4.tensor_amax(expected[linear.megatron])
    ]
    assert not followed  # scales that are not frozen would have followed the weights
