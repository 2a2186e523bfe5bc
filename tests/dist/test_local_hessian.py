"""The scale rule local_hessian in jobs: the same scales under any parallelism, in PTQ, training and exports."""

from pathlib import Path

import pytest
import tiny_hybrids
import tiny_job
import torch
from test_training import Workshop

from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.quantization.carried_scales import AMAX, BLOCK_SCALES

MODELS = {"gated": tiny_hybrids.QWEN3_MOE, "squared": tiny_hybrids.NEMOTRON_H}
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PARALLELISM = {
    "tp2": TP2,
    "dp2": [],
    "ep2": ["--expert-model-parallel-size", "2"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
}
KINDS = ("attention", "mamba", "mlp", "expert", "shared_expert")
PTQ = ["--qad-ptq", "--eval-iters", "0"]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("hessian")
    models = []
    for name, config in MODELS.items():
        source = tiny_job.write_hf(directory / f"hf_{name}", config)
        models += [(str(source), f"{directory}/{name}_{role}", "float32") for role in ("teacher", "student")]
    tiny_job.write_data(directory / "data", vocab_size=120)
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return Workshop(directory, server)


def policy(directory: Path, fmt: str = "nvfp4", update: str = "frozen") -> str:
    file = directory / f"{fmt}-{update}.yaml"
    file.write_text(
        f"rules:\n- {{kind: [{', '.join(KINDS)}], format: {fmt}, scales: local_hessian, update: {update}}}\n"
        "- {kind: head, format: bf16}\n"
    )
    return str(file)


def saved(workshop, run: str, model: str, *flags: str, nproc: int = 1, fmt: str = "nvfp4", num_steps: int = 1) -> Path:
    """Run a job, unless an earlier test did, and return its directory."""
    directory = workshop.directory / run
    if not directory.exists():
        argv = workshop.argv("--qad-policy", policy(workshop.directory, fmt=fmt), kind=model, num_steps=num_steps)
        workshop.server.run("training_jobs:train", nproc, {"argv": [*argv, *flags, "--save", str(directory)]})
    return directory


def scales(workshop, *runs: Path) -> list[dict[str, torch.Tensor]]:
    """Return the amaxes and block scales of the newest checkpoint of each run, as one process would store them."""
    result = workshop.directory / "tensors.pt"
    workshop.server.run("ptq_jobs:tensors", 1, {"checkpoints": list(map(str, runs)), "result": str(result)})
    runs = torch.load(result)
    return [{name: x for name, x in tensors.items() if AMAX in name or BLOCK_SCALES in name} for tensors in runs]


EP2 = pytest.param("gated", "ep2", 4, "nvfp4-w4a16", marks=pytest.mark.all)
PP2 = pytest.param("squared", "pp2", 2, "nvfp4", marks=pytest.mark.all)
CASES = [("squared", "tp2", 2, "nvfp4"), ("gated", "dp2", 2, "nvfp4-w4a16"), EP2, PP2]


@pytest.mark.parametrize("model, parallelism, nproc, fmt", CASES)
def test_scales_do_not_depend_on_parallelism(workshop, model, parallelism, nproc, fmt):
    """All block scales equal those of one process bit for bit, although H differs in its last bits.

    Some experts of the gated model get fewer tokens than ``MIN_TOKENS`` on a rank, and enough on both ranks together.
    Four ranks with EP 2 have experts that are replicated over two ranks.
    """
    flags = ["--micro-batch-size", "1", "--qad-calibration-samples", "4"] if model == "gated" else []
    one = saved(workshop, f"{model}-{fmt}-one", model, *PTQ, *flags, fmt=fmt)
    many = [*PTQ, *flags, *PARALLELISM[parallelism]]
    many = saved(workshop, f"{model}-{fmt}-{parallelism}", model, *many, nproc=nproc, fmt=fmt)
    expected, actual = scales(workshop, one, many)
    assert actual.keys() == expected.keys() and len(actual) > 10
    assert [name for name, x in expected.items() if not torch.equal(actual[name], x)] == []


def test_training_freezes_the_scales_of_the_calibration(workshop):
    """Those of a PTQ job on the same data. A resume keeps them, although its weights have changed."""
    model, run = "squared", "squared-training"
    first = saved(workshop, run, model, "--exit-interval", "1", fmt="nvfp4", num_steps=2)
    one = saved(workshop, f"{model}-nvfp4-one", model, *PTQ, fmt="nvfp4")
    ptq, trained = scales(workshop, one, first)
    assert all(torch.equal(trained[name], x) for name, x in ptq.items())
    argv = workshop.argv("--qad-policy", policy(workshop.directory, fmt="nvfp4"), kind=model, num_steps=2)
    workshop.server.run("training_jobs:train", 1, {"argv": [*argv, "--save", str(first)]})
    (resumed,) = scales(workshop, first)
    assert (first / "iter_0000002").exists() and resumed.keys() == ptq.keys()
    assert all(torch.equal(resumed[name], x) for name, x in ptq.items())
    for source in (one, first):
        outputs = {layout: f"{source}-{layout}" for layout in ("modelopt", "compressed-tensors")}
        workshop.server.run("training_jobs:export_checkpoint", 1, {"checkpoint": str(source), "outputs": outputs})
        for output in outputs.values():
            report = validate_nvfp4(output, against=workshop.directory / f"hf_{model}")
            assert not report.issues, report.issues[:5]


def test_sequential_ptq_chooses_the_scales_of_the_whole_model(workshop):
    one = saved(workshop, "squared-nvfp4-one", "squared", *PTQ, fmt="nvfp4")
    sequential = saved(workshop, "sequential", "squared", *PTQ, "--qad-ptq-sequential", fmt="nvfp4")
    expected, actual = scales(workshop, one, sequential)
    assert actual.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(actual[name], x)] == []


def test_refusals(workshop):
    every_step = policy(workshop.directory, update="every_step")
    base = ["--qad-policy", every_step, "--qad-dry-run"]
    error = workshop.fail(workshop.argv(*base, kind="gated", num_steps=1))
    assert "has the scale rule local_hessian, which needs 'update: frozen'" in error
    base = ["--qad-policy", policy(workshop.directory), "--qad-dry-run", "--qad-loss", "kl + 1e-4*scale_growth"]
    error = workshop.fail(workshop.argv(*base, kind="gated", num_steps=1))
    assert "scale_growth compares scales with those at the start" in error
