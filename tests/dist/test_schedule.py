"""The simulator of pipeline schedules against a job that was measured."""

import statistics

import pytest
import tiny_job
import torch
from launch import ROOT

LARGE = tiny_job.LLAMA | {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 32}
FLAGS = (
    "--split 80,20,0 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 8 --lr 1e-3 "
    "--eval-iters 0 --log-interval 1 --qad-calibration-samples 16 --qad-policy bf16 --pipeline-model-parallel-size 2"
).split()


@pytest.fixture
def argv(tmp_path, server) -> list[str]:
    """A job on two stages, whose teacher is larger than its student."""
    configs = {"teacher": LARGE, "student": tiny_job.LLAMA}
    models = [
        (str(tiny_job.write_hf(tmp_path / f"hf_{who}", config)), f"{tmp_path}/{who}", "float32")
        for who, config in configs.items()
    ]
    tiny_job.write_data(tmp_path / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    given = ["--qad-teacher", f"{tmp_path}/teacher", "--qad-student", f"{tmp_path}/student"]
    given += ["--data-path", f"{tmp_path}/data", "--data-cache-path", f"{tmp_path}/cache"]
    return [*given, *FLAGS, *tiny_job.READ_HERE]


@pytest.mark.alone
def test_the_simulator_predicts_a_measured_step(server, argv, tmp_path, monkeypatch):
    """tools/simulate_schedule.py, given each rank's median costs, against the steps that they were measured in. What
    else runs on the machine delays one rank or the other: of three jobs one must be undisturbed."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))  # by its own name: in a whole run "tools" is tests/unit/tools
    # Not in the costs: sends, and what runs between passes. Without any overlap a step would take 1.6 times as long.
    ratios = (_measured_by_predicted(server, argv, tmp_path / str(i)) for i in range(3))
    assert any(abs(ratio - 1) <= 0.3 for ratio in ratios)


def _measured_by_predicted(server, argv, result) -> float:
    from simulate_schedule import Costs, simulate

    server.run("axes_jobs:measure_schedule", 2, {"argv": argv, "result": str(result)})
    ranks = [torch.load(f"{result}.rank{rank}")[2:] for rank in range(2)]
    costs = []
    for steps in ranks:
        kinds = {kind: [end - start for step in steps for k, start, end in step if k == kind] for kind in "FBT"}
        assert {kind: len(times) for kind, times in kinds.items()} == dict.fromkeys("FBT", 4 * len(steps))
        costs.append(Costs(*(statistics.median(kinds[kind]) for kind in "FBT")))
    measured = statistics.median(
        max(step[-1][2] for step in both) - min(step[0][1] for step in both) for both in zip(*ranks, strict=True)
    )
    predicted = simulate("first", 2, 1, 4, costs).time
    alone = sum(4 * (c.forward + c.backward + c.teacher) for c in costs)
    print(f"measured {measured * 1e3:.1f} ms, predicted {predicted * 1e3:.1f} ms, without overlap {alone * 1e3:.1f} ms")
    return measured / predicted
