"""NaN, loss spikes, and slow or hanging ranks are reported by step, rank and layer, and handled as the flags say."""

import re
from pathlib import Path

import pytest
import torch
from test_checkpoints import Jobs, make_inputs

FAILING = "surviving_jobs:train_with_failure"
PP2 = ["--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("numbers")
    make_inputs(directory, server)
    return Jobs(directory, server)


@pytest.fixture(scope="module")
def reference_run(jobs) -> tuple[list[dict], str]:
    return jobs.train(jobs.argv(num_steps=14))


@pytest.fixture(scope="module")
def reference_steps(reference_run) -> list[dict]:
    return reference_run[0]


def learning_rates(output: str) -> list[str]:
    """Return the logged learning rate of each step."""
    return re.findall(r"\blr: (\S+)", output)


def equal(a: dict, b: dict, key: str) -> bool:
    return a[key].keys() == b[key].keys() and all(torch.equal(a[key][name], b[key][name]) for name in a[key])


# name -> (injected failure, flags, part of the error)
NOT_FINITE = {
    "output": (
        {"kind": "output", "name": "decoder.layers.2.self_attention.linear_proj", "step": 3, "rank": 1},
        [],
        "Found: rank 1, the student: 4096 of 4096 values in the output of decoder.layers.2.self_attention.linear_proj",
    ),
    "output on a later stage": (
        {"kind": "output", "name": "decoder.layers.3.mlp.linear_fc2", "step": 2, "rank": 1},
        PP2,
        "Found: rank 1, the student: 4096 of 4096 values in the output of decoder.layers.3.mlp.linear_fc2",
    ),
    "gradient": (
        {"kind": "gradient", "name": "decoder.layers.1.mlp.linear_fc1.weight", "step": 3, "rank": 0},
        PP2,
        "Found: rank 0, the gradient: 12288 of 12288 values of decoder.layers.1.mlp.linear_fc1.weight are NaN or Inf",
    ),
    "once": (
        {"kind": "output", "name": "decoder.layers.1.mlp.linear_fc2", "step": 3, "rank": 0, "once": True},
        [],
        "",
    ),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_error_names_step_rank_and_layer(jobs, case):
    failure, flags, message = NOT_FINITE[case]
    error = jobs.fail(FAILING, 2, argv=jobs.argv(*flags), failure=failure)
    assert f"error: step {failure['step']}: a loss or a gradient is NaN or Inf, and no weight was changed" in error
    assert message in error
    if case == "once":  # the trace then finds only the gradients of the first pass
        assert "the student" not in error and "the gradient:" in error


def test_skipped_step_changes_no_weight(jobs, reference_steps):
    """Neither master weights nor quantized weights change; the steps before equal those of the reference run."""
    failure = {"kind": "output", "name": "decoder.layers.2.self_attention.linear_proj", "step": 3, "rank": 0}
    steps, output = jobs.train(jobs.argv("--qad-on-nan", "skip", num_steps=14), function=FAILING, failure=failure)
    assert len(steps) == 14
    (warning,) = [line for line in output.splitlines() if "megatron_qad: WARNING: step 3" in line]
    assert "decoder.layers.2.self_attention.linear_proj" in warning and "The step is skipped" in warning
    assert equal(steps[1], reference_steps[1], "masters")
    assert equal(steps[2], steps[1], "masters") and not equal(steps[3], steps[2], "masters")
    assert equal(steps[3], steps[2], "quantized") and equal(steps[2], reference_steps[2], "quantized")
    skipped = [line for line in output.splitlines() if "skipped updates: 1" in line]
    assert len(skipped) == 1 and "iteration 3/14 | skipped" in skipped[0]


def test_repeated_skipping_ends_the_job(jobs):
    failure = {
        "kind": "output",
        "name": "decoder.layers.2.self_attention.linear_proj",
        "step": 2,
        "rank": 0,
        "from": True,
    }
    error = jobs.fail(FAILING, argv=jobs.argv("--qad-on-nan", "skip", num_steps=20), failure=failure)
    assert "error: step 11:" in error and "skipping does not help" in error


def test_spike_rolls_back_to_last_checkpoint(jobs, reference_run, tmp_path):
    """At step 11 the weights are corrupted. The loss spikes before the update, the checkpoint of step 10 is loaded, and
    step 12 has the weights and learning rate of step 11 in the reference run. The checkpoint contains the losses that
    detect a spike, so a job that resumes at 10 does the same."""
    reference_steps, rates = reference_run[0], learning_rates(reference_run[1])
    failure = {"kind": "weights", "step": 11, "rank": 0}
    run = tmp_path / "run"
    argv = jobs.argv("--save", str(run), "--qad-spike-factor", "3", "--save-interval", "5", num_steps=14)
    steps, output = jobs.train(argv, function=FAILING, failure=failure)
    (spike,) = [line for line in output.splitlines() if "the loss of step 11 is" in line]
    assert "more than 3 times" in spike and "the median of the last 10" in spike
    (rollback,) = [line for line in output.splitlines() if "rolled back to the checkpoint of iteration 10" in line]
    assert "The batches of steps 11 to 11 (samples 80 to 87) are skipped" in rollback
    assert all(equal(steps[i], reference_steps[i], "masters") for i in range(10))
    assert equal(steps[11], reference_steps[10], "quantized")
    assert len(set(rates)) == 14 and learning_rates(output) == rates[:10] + rates[9:13]
    assert torch.equal(steps[11]["batches"][0]["tokens"], reference_steps[11]["batches"][0]["tokens"])
    resumed, output = jobs.train([*argv, "--load", str(run), "--ckpt-step", "10"], function=FAILING, failure=failure)
    assert "rolled back to the checkpoint of iteration 10" in output
    assert [step["loss"] for step in resumed[1:]] == [step["loss"] for step in steps[11:]]
    assert all(equal(a, b, "masters") for a, b in zip(resumed[1:], steps[11:], strict=True))


def test_repeated_spikes_roll_back_further(jobs, tmp_path):
    """First to 10, then to 5, because 10 is rejected; then no checkpoint is left."""
    failure = {"kind": "weights", "step": 11, "rank": 0, "from": True}
    argv = jobs.argv("--save", str(tmp_path), "--qad-spike-factor", "3", "--save-interval", "5", num_steps=14)
    output = jobs.server.run(FAILING, 1, {"argv": argv, "failure": failure}, fails=True)
    assert "rolled back to the checkpoint of iteration 10" in output
    assert "rolled back to the checkpoint of iteration 5" in output
    assert f"error: step 13: the loss spikes again from every checkpoint in {tmp_path}" in output


def test_slow_rank_is_reported(jobs, tmp_path):
    failure = {"kind": "slow", "step": 1, "rank": 1, "from": True}
    argv = jobs.argv("--log-interval", "2", "--save", str(tmp_path / "run"), num_steps=6)
    jobs.train(argv, 2, FAILING, failure=failure)
    log = (tmp_path / "run" / "megatron.rank1.log").read_text()
    lines = [line for line in log.splitlines() if "megatron_qad step times" in line]
    assert len(lines) == 3, lines
    assert all("waited for: rank 1" in line for line in lines[1:]), lines  # the first includes the ranks' start-up


def test_hanging_rank_is_reported_and_ends_the_job(jobs, tmp_path):
    failure = {"kind": "stopped", "step": 3, "rank": 1}
    argv = jobs.argv("--save", str(tmp_path), "--qad-hang-timeout", "8")
    error = jobs.fail(FAILING, 2, argv=argv, failure=failure)
    assert error.startswith("error: no progress for") and "furthest behind first: rank 1 on " in error
    assert "in step 3, data, " in error.split("rank 1 on", 1)[1].split(";")[0]
    assert "in step 3, gradients, " in error.split("rank 0 on", 1)[1]
    assert Path(tmp_path / "heartbeats" / "rank_00001.json").is_file()


def test_slow_disk_is_not_a_hang(jobs, tmp_path):
    """Each load and each save takes longer than the limit of other phases."""
    argv = jobs.argv("--save", str(tmp_path), "--qad-hang-timeout", "5", num_steps=1)
    jobs.server.run("surviving_jobs:train_with_slow_disk", 1, {"argv": argv, "seconds": 6})
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
