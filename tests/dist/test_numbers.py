"""Numbers that go wrong, and ranks that do: named by step, rank and layer, skipped, rolled back, waited for, ended."""

import re
from pathlib import Path

import pytest
import torch
from test_checkpoints import Shop, make_inputs

FAULTY = "surviving_jobs:train_with_fault"
PP2 = ["--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("numbers")
    make_inputs(directory, server)
    return Shop(directory, server)


@pytest.fixture(scope="module")
def undisturbed(shop) -> tuple[list[dict], str]:
    return shop.train(shop.argv(num_steps=14))


@pytest.fixture(scope="module")
def through(undisturbed) -> list[dict]:
    return undisturbed[0]


def learning_rates(output: str) -> list[str]:
    """As logged, after each step."""
    return re.findall(r"learning rate: (\S+)", output)


def equal(a: dict, b: dict, what: str) -> bool:
    return a[what].keys() == b[what].keys() and all(torch.equal(a[what][name], b[what][name]) for name in a[what])


# what is injected, layout -> what the error says of it
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
def test_stopping_names_step_rank_and_layer(shop, case):
    fault, flags, said = NOT_FINITE[case]
    error = shop.fail(FAULTY, 2, argv=shop.argv(*flags), fault=fault)
    assert f"error: step {fault['step']}: a loss or a gradient is NaN or Inf, and no weight was changed" in error
    assert said in error
    if case == "once":  # what a trace finds then are the gradients that it left
        assert "the student" not in error and "the gradient:" in error


def test_a_skipped_step_leaves_no_trace(shop, through):
    """Neither in the masters nor in the weights on the grid; the steps before are the undisturbed run's."""
    fault = {"kind": "output", "name": "decoder.layers.2.self_attention.linear_proj", "step": 3, "rank": 0}
    steps, output = shop.train(shop.argv("--qad-on-nan", "skip", num_steps=14), function=FAULTY, fault=fault)
    assert len(steps) == 14
    (warning,) = [line for line in output.splitlines() if "megatron_qad: WARNING: step 3" in line]
    assert "decoder.layers.2.self_attention.linear_proj" in warning and "The step is skipped" in warning
    assert equal(steps[1], through[1], "masters")
    assert equal(steps[2], steps[1], "masters") and not equal(steps[3], steps[2], "masters")
    assert equal(steps[3], steps[2], "quantized") and equal(steps[2], through[2], "quantized")
    skipped = [line for line in output.splitlines() if "number of skipped iterations:   1" in line]
    assert len(skipped) == 1 and "iteration        3/" in skipped[0]


def test_skipping_ends_where_it_does_not_help(shop):
    fault = {
        "kind": "output",
        "name": "decoder.layers.2.self_attention.linear_proj",
        "step": 2,
        "rank": 0,
        "from": True,
    }
    error = shop.fail(FAULTY, argv=shop.argv("--qad-on-nan", "skip", num_steps=20), fault=fault)
    assert "error: step 11:" in error and "skipping does not help" in error


def test_a_spike_goes_back_to_the_last_checkpoint(shop, undisturbed, tmp_path):
    """At step 11 the weights are spoilt. The loss says so before the update, the checkpoint of step 10 is loaded, and
    step 12 runs with its weights and learning rate, as step 11 of the undisturbed run did. The losses that it is judged
    by are in the checkpoint: a job that resumes at 10 does the same."""
    through, rates = undisturbed[0], learning_rates(undisturbed[1])
    fault = {"kind": "weights", "step": 11, "rank": 0}
    run = tmp_path / "run"
    argv = shop.argv("--save", str(run), "--qad-spike-factor", "3", "--save-interval", "5", num_steps=14)
    steps, output = shop.train(argv, function=FAULTY, fault=fault)
    (spike,) = [line for line in output.splitlines() if "the loss of step 11 is" in line]
    assert "more than 3 times" in spike and "the median of the last 10" in spike
    (back,) = [line for line in output.splitlines() if "rolled back to the checkpoint of iteration 10" in line]
    assert "The batches of steps 11 to 11 (samples 80 to 87) are left out" in back
    assert all(equal(steps[i], through[i], "masters") for i in range(10))
    assert equal(steps[11], through[10], "quantized")
    assert len(set(rates)) == 14 and learning_rates(output) == rates[:10] + rates[9:13]
    assert torch.equal(steps[11]["batches"][0]["tokens"], through[11]["batches"][0]["tokens"])
    resumed, output = shop.train([*argv, "--load", str(run), "--ckpt-step", "10"], function=FAULTY, fault=fault)
    assert "rolled back to the checkpoint of iteration 10" in output
    assert [step["loss"] for step in resumed[1:]] == [step["loss"] for step in steps[11:]]
    assert all(equal(a, b, "masters") for a, b in zip(resumed[1:], steps[11:], strict=True))


def test_spikes_that_return_go_further_back(shop, tmp_path):
    """From 10, then from 5, as 10 is not trusted any more; then there is none left. Damaged ones are passed over."""
    fault = {"kind": "weights", "step": 11, "rank": 0, "from": True}
    argv = shop.argv("--save", str(tmp_path), "--qad-spike-factor", "3", "--save-interval", "5", num_steps=14)
    output = shop.server.run(FAULTY, 1, {"argv": argv, "fault": fault}, fails=True)
    assert "rolled back to the checkpoint of iteration 10" in output
    assert "rolled back to the checkpoint of iteration 5" in output
    assert f"error: step 13: the loss spikes again from every checkpoint in {tmp_path}" in output


def test_the_slow_rank_is_named(shop):
    fault = {"kind": "slow", "step": 1, "rank": 1, "from": True}
    argv = shop.argv("--log-interval", "2", num_steps=6)
    _, output = shop.train(argv, 2, FAULTY, fault=fault)
    lines = [line for line in output.splitlines() if "megatron_qad step times" in line]
    assert len(lines) == 3, lines
    assert all("waited for: rank 1" in line for line in lines[1:]), lines  # the first has the ranks' starts in it


def test_a_hanging_rank_is_named_and_ends_the_job(shop, tmp_path):
    fault = {"kind": "stopped", "step": 3, "rank": 1}
    argv = shop.argv("--save", str(tmp_path), "--qad-hang-timeout", "8")
    error = shop.fail(FAULTY, 2, argv=argv, fault=fault)
    assert error.startswith("error: no progress for") and "furthest behind first: rank 1 on " in error
    assert "in step 3, data, " in error.split("rank 1 on", 1)[1].split(";")[0]
    assert "in step 3, gradients, " in error.split("rank 0 on", 1)[1]
    assert Path(tmp_path / "heartbeats" / "rank_00001.json").is_file()


def test_a_slow_disk_is_no_hang(shop, tmp_path):
    """Each load and each save takes longer than a part of a step may."""
    argv = shop.argv("--save", str(tmp_path), "--qad-hang-timeout", "5", num_steps=1)
    shop.server.run("surviving_jobs:train_with_slow_disk", 1, {"argv": argv, "seconds": 6})
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
