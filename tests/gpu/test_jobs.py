"""Complete four-step jobs on one GPU through the command line, compared with each other and with the CPU.

They use Megatron's local layers and, if installed, those of Transformer Engine. Each process takes half a minute. The
tests have not been run on a GPU in this form; jobs of other sizes have (docs/lab_log.md).
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qad.engine import capabilities

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(capabilities().device != "cuda", reason="needs a GPU: jobs run on it")
SPECS = ["local", "te"] if importlib.util.find_spec("transformer_engine") else ["local"]
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
FLAGS = (
    "--train-iters",
    "4",
    "--lr",
    "1e-3",
    "--seq-length",
    "64",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "4",
)
FLAGS += ("--split", "100,0,0", "--eval-iters", "0", "--log-interval", "1", "--qad-calibration-samples", "4")


def run(*command, **environment) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "dist"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path, **environment}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


INPUTS = """
import sys
from pathlib import Path
from megatron_qad.engine import init_runtime
init_runtime()
import tiny_job
d = Path(sys.argv[1])
config = tiny_job.LLAMA | {"torch_dtype": "bfloat16"}
tiny_job.write_hf(d / "hf_teacher", config)
tiny_job.write_hf(d / "hf_student", config, noise=0.1)
tiny_job.write_data(d / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    d = tmp_path_factory.mktemp("jobs")
    run("-c", INPUTS, d)
    for role in ("teacher", "student"):
        run("tools/import_hf.py", "--hf-model", d / f"hf_{role}", "--output", d / role)
    return d


def losses(inputs: Path, *flags, **environment) -> list[float]:
    """Run a job and return the loss of each step from its log."""
    models = ("--qad-teacher", inputs / "teacher", "--qad-student", inputs / "student", "--data-path", inputs / "data")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "pretrain_qad.py")
    values = re.findall(r"kl loss: (\S+)", run(*launch, *models, *FLAGS, *flags, **environment))
    assert len(values) == 4
    return [float(value) for value in values]


@pytest.mark.parametrize("spec", SPECS)
def test_job_variants_have_same_losses(inputs, spec, tmp_path):
    job = ("--bf16", "--use-distributed-optimizer", "--qad-layer-spec", spec)
    plain = losses(inputs, *job, "--save", tmp_path / "run")
    assert plain[-1] < plain[0]
    assert (
        losses(inputs, *job, "--qad-teacher-cpu-offload", *RECOMPUTE) == plain
    )  # the same arithmetic in the same order
    # The logits' products and one rounding of the weights have another order: one or two bf16 ulps after three updates.
    assert losses(inputs, *job, "--qad-fused-linear-loss", "always") == pytest.approx(plain, rel=2e-2)
    for layout in ("modelopt", "compressed-tensors"):
        run("tools/export_hf.py", "--checkpoint", tmp_path / "run", "--output", tmp_path / layout, "--layout", layout)
        assert ": valid;" in run("tools/validate_nvfp4.py", tmp_path / layout)


def test_float32_job_has_losses_of_cpu(inputs):
    """The job is unquantized, because rounding errors can change the codes of quantized inputs."""
    job = ("--qad-policy", "bf16", "--qad-layer-spec", "local")
    on_cpu = losses(inputs, *job, CUDA_VISIBLE_DEVICES="")
    # float32 sums have another order, and Adam's first step divides small gradients by themselves
    # (docs/decisions/parallelism.md).
    assert losses(inputs, *job) == pytest.approx(on_cpu, rel=1e-3)
