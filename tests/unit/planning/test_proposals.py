"""Proposals for published models: they are valid and fit, and what does not fit gets a remedy that does."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_qad.config.parallelism import parallelism_problem
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine import QADError
from megatron_qad.planning.activations import TE
from megatron_qad.planning.proposal_tables import LOSSES, lines, read_job
from megatron_qad.planning.proposals import Planner, Request, command_line, flags_of
from megatron_qad.planning.step_time import Machine

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "tests/unit/quantization/configs"
MACHINE = Machine(peak=989.5e12)


def planner(model: str, num_gpus: int = 8, memory: float = 68e9, seq_length: int = 8192, batch: int = 64) -> Planner:
    job = read_job(str(CONFIGS / f"{model}.json"), None, model, [], TE)
    return Planner(job, LOSSES, Request(num_gpus, memory, seq_length, batch), MACHINE)


@pytest.fixture(scope="module")
def nano():
    return planner("nemotron-nano-9b-v2")


@pytest.fixture(scope="module")
def experts():
    return planner("nemotron-3-nano-30b-a3b", 32)


@pytest.mark.parametrize("name", ["nano", "experts"])
def test_proposals_fit_and_are_valid(request, name):
    plan = request.getfixturevalue(name)
    fitting = plan.fitting()
    assert fitting and all(proposal.bytes <= 68e9 for proposal in fitting)
    assert [p.time.total for p in fitting] == sorted(p.time.total for p in fitting)
    shapes = {"the student": plan.job.student.args}
    for proposal in fitting:
        assert proposal.layout.world_size == plan.request.num_gpus
        assert parallelism_problem(flags_of(proposal.layout), QADOptions(), shapes, plan.request.num_gpus) is None


def test_experts_are_spread(experts):
    """Without expert parallelism, only deep pipelines hold 63 GB of weights twice, and they wait for each other."""
    best = experts.fitting()[0]
    assert best.layout.ep > 1 and "--expert-model-parallel-size" in command_line(best, has_experts=True)
    assert all(proposal.layout.pp > 1 for proposal in experts.fitting() if proposal.layout.ep == 1)


def test_what_does_not_fit_has_a_reason_and_a_remedy(nano):
    large = nano.not_fitting()
    assert large and all(proposal.bytes > 68e9 for proposal in large)
    remedies = [remedy for proposal in large if (remedy := nano.remedy(proposal)) is not None]
    assert remedies and all(remedy.change and remedy.bytes <= 68e9 for remedy in remedies)
    text = "\n".join(lines(nano, 0.5e9))
    assert "Fits with full recomputation" in text and "--use-distributed-optimizer" in text


def test_nothing_fits_into_a_small_gpu():
    plan = planner("nemotron-nano-9b-v2", num_gpus=1, memory=20e9)
    text = "\n".join(lines(plan, 0.5e9))
    assert not plan.fitting() and "  none" in text and "too large, the nearest 1 of 1" in text
    assert "No single change makes it fit" in text


def test_batch_that_no_layout_divides_is_refused():
    with pytest.raises(QADError, match="no layout of 61 GPUs is valid for sequences of 8192 tokens and a batch of 64"):
        planner("nemotron-nano-9b-v2", num_gpus=61).all  # noqa: B018


def test_command_line_prints_a_plan_without_megatron():
    arguments = ["--hf-model", str(CONFIGS / "acereason-nemotron-7b.json"), "--gpus", "8", "--gpu-memory", "80"]
    code = f"""
import sys
for package in ("megatron", "modelopt", "transformer_engine"):
    sys.modules[package] = None  # makes an import of it fail
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tools")!r}]
sys.argv = ["plan.py", *{[*arguments, "--seq-length", "4096"]!r}]
import plan
plan.main()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr[-3000:]
    assert "model       Qwen2ForCausalLM, 7,615,616,512 parameters" in done.stdout
    assert "H100 with 989.5 TFLOP/s of dense BF16, MFU 35%" in done.stdout and "GPU-hours" in done.stdout
