"""Grouped experts: equal to separate MLPs, and checkpoints that load with any parallelism and from older versions."""

import shutil

import pytest
import tiny_hybrids
import tiny_job
import torch
from test_training import TOLERANCE, Workshop

from megatron_qad.engine.run_directory import json_records, manifest

TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
EP2 = ["--expert-model-parallel-size", "2"]
EP4 = ["--expert-model-parallel-size", "4"]
SHARDED = ["--bf16", "--use-distributed-optimizer"]
MODELS = {
    "gated": tiny_hybrids.QWEN3_MOE,
    "squared ReLU": tiny_hybrids.NEMOTRON_H,
    "latent": tiny_hybrids.CASES["nemotron-h, latent experts"],
}
# Tensor-parallel size, ranks and flags.
PARALLELISM = {"one": (1, 1, []), "ep2": (1, 2, EP2), "etp2": (2, 2, TP2), "tp2ep2": (2, 4, TP2 + EP2)}
SLOW = [pytest.param(name, marks=pytest.mark.all) for name in ("ep2", "etp2")]
LOADS = {
    "balanced": [8] * 8,
    "skewed": [50, 1, 3, 2, 5, 1, 1, 1],
    "some empty": [0, 40, 0, 7, 17, 0, 0, 0],
    "one expert": [0, 0, 0, 64, 0, 0, 0, 0],
    "no token": [0] * 8,
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("experts")
    models = []
    for name, config in MODELS.items():
        for role, noise in (("teacher", 0.0), ("student", 0.3)):
            source = tiny_job.write_hf(directory / f"hf_{name}_{role}", config, noise=noise)
            models.append((str(source), f"{directory}/{name}_{role}", "float32"))
    tiny_job.write_data(directory / "data", vocab_size=120)
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Workshop(directory, server)


@pytest.mark.parametrize("parallelism", ["one", *SLOW, "tp2ep2"])
def test_grouped_experts_equal_separate_mlps(workshop, parallelism):
    """In values and gradients, for every load; the stored tensors are the same, with the same names."""
    tp, nproc, flags = PARALLELISM[parallelism]
    for model in MODELS:
        result = str(workshop.directory / "errors")
        arguments = {"checkpoint": f"{workshop.directory}/{model}_teacher", "tp": tp, "flags": flags}
        arguments |= {"loads": LOADS, "result": result}
        workshop.server.run("expert_jobs:compare_with_loop", nproc, arguments)
        errors = torch.load(result)
        print(f"{model} {parallelism}: {max(errors.values()):.1e} ({max(errors, key=errors.get)})")
        assert len(errors) == 5 * len(LOADS)
        # Three float32 products in sequence, each a sum of at most 64 terms that may be in another order.
        assert max(errors.values()) <= 3 * 64 * 2**-24, (model, errors)


def test_amaxes_of_older_checkpoints_load_as_their_maximum(workshop):
    """An older version stored an amax for each expert; servers compute with the largest. At EP 2, rank 0 reads all."""
    flags = ["--qad-policy", "nvfp4-all-linear", *EP2]
    result = str(workshop.directory / "merged")
    arguments = {"checkpoint": f"{workshop.directory}/gated_teacher", "flags": flags, "result": result}
    workshop.server.run("expert_jobs:merged_amaxes", 2, arguments)
    merged = torch.load(result)
    assert len(merged) == 2 * 2  # two layers, two projections
    assert all(torch.equal(amax, torch.tensor([8.0])) for amax in merged.values())


def test_nan_is_traced_to_the_expert(workshop):
    result = str(workshop.directory / "trace")
    arguments = {"checkpoint": f"{workshop.directory}/gated_teacher", "flags": EP2, "result": result}
    workshop.server.run("expert_jobs:trace_nan_gradient", 2, arguments)
    name = "decoder.layers.1.mlp.experts.experts.5.linear_fc2.weight"
    assert torch.load(result) == [(1, f"the gradient: 1 of {4 * 64 * 32} values of {name} are NaN or Inf")]


# Parallelism of each step, and flags and tolerance of the loss. In BF16 other partial sums are rounded to 8 bits, which
# changes the loss by 2e-3 here.
RESHARDED = [("tp2ep2", 4, TP2 + EP2), ("ep4", 4, EP4), ("ep2", 2, EP2)]
RESUMED = {
    "float32": ([], TOLERANCE),
    "distributed optimizer": ([*SHARDED, "--dist-ckpt-optim-fully-reshardable"], 5e-3),
}


@pytest.mark.parametrize("case", ["float32", pytest.param("distributed optimizer", marks=pytest.mark.all)])
def test_experts_and_their_optimizer_state_resume_with_other_parallelism(workshop, tmp_path, case):
    flags, tolerance = RESUMED[case]
    argv = workshop.argv("--qad-policy", "bf16", "--adam-eps", "1e-5", *flags, kind="gated", num_steps=len(RESHARDED))
    expected, _ = workshop.train(argv, whole=False)
    for i, (name, nproc, parallelism) in enumerate(RESHARDED):
        saving = ["--save", str(tmp_path), "--save-interval", "1", "--exit-interval", str(i + 1)]
        loading = ["--load", str(tmp_path)] if i else []
        (step,), _ = workshop.train([*argv, *parallelism, *saving, *loading], nproc, whole=False)
        error = abs(step["loss"]["kl loss"] / expected[i]["loss"]["kl loss"] - 1)
        print(f"{case} {name}: step {i + 1}, loss {error:.1e}")
        assert error <= tolerance, name


def test_optimizer_state_that_cannot_be_loaded_is_refused(workshop, tmp_path):
    """Flat buffers of separate experts have the size of ours and would be loaded in another order. Megatron cannot load
    the state of one optimizer into two. The weights can still be used."""
    run, older = tmp_path / "run", tmp_path / "older"
    argv = workshop.argv("--qad-policy", "bf16", *SHARDED, kind="gated", num_steps=2)
    argv += ["--no-dist-ckpt-optim-fully-reshardable", "--save-interval", "1", "--save"]
    workshop.train([*argv, str(run), "--exit-interval", "1"], whole=False)
    shutil.copytree(run, older)
    record = older / "iter_0000001" / "qad.json"
    job = json_records.read(record)
    json_records.write(record, {key: value for key, value in job.items() if key != "expert_parameters"})
    manifest.write_manifest(record.parent)
    error = workshop.fail([*argv, str(older)])
    assert f"--load {older}: the optimizer state of iter_0000001 is in the order of separate parameters" in error
    steps, _ = workshop.train([*argv, str(older), "--no-load-optim"], whole=False)
    assert len(steps) == 1
    error = workshop.fail([*argv, str(run), *EP2], 2)
    assert f"--expert-model-parallel-size 2: {run / 'iter_0000001'} was saved with 1" in error
    steps, _ = workshop.train([*argv, str(run)], whole=False)
    assert len(steps) == 1
