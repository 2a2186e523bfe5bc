"""launch/slurm.sbatch on a real cluster: what a job loses when it is preempted, or when a node dies, is nothing."""

import pytest
import runs
import torch
from place import ROOT

SECRETS = {"WANDB_API_KEY": "0d15ea5e" * 5, "HF_TOKEN": "hf_dontprintthisdontprintthis"}


@pytest.fixture
def assert_undisturbed(undisturbed):
    """The run's history and last checkpoint are the undisturbed run's, bit for bit."""

    def compare(run):
        expected = runs.history(undisturbed[0])
        assert runs.history(run) == expected
        assert len(expected["kl loss"]) == 24
        found, wanted = runs.tensors(run), runs.tensors(undisturbed[0])
        assert found.keys() == wanted.keys()
        assert {name.split(".")[0] for name in wanted} >= {"decoder", "optimizer"}, sorted(wanted)[:20]
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    return compare


def starts(log) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("slurm.sbatch: job")]


def test_a_preempted_job_saves_and_goes_on(place, assert_undisturbed):
    """A more urgent job takes all nodes: the batch script is warned, the ranks save, the job is queued again."""
    wandb = ["--wandb-project", "ci"]
    command = ["launch/slurm.sbatch", *place.arguments("preempted"), *wandb]
    job = place.submit("preempted", *command, WANDB_MODE="offline", **SECRETS)
    log = place.log("preempted")
    place.cluster.wait(job, lambda _: log.is_file() and runs.iteration(log) >= 1, 300, log)
    urgent = place.submit("urgent", "--wrap=true", options=("--partition=urgent", "--nodes=3", "--exclusive"))
    place.cluster.wait(urgent, lambda state: state["JobState"] == "COMPLETED", 300, log)
    assert 1 <= runs.iteration(log) < 24, "the job was not stopped on its way"
    state = place.cluster.wait(job, lambda state: state["JobState"] == "COMPLETED", 300, log)

    assert state["Restarts"] == "1" and [line.split(", ")[1] for line in starts(log)] == ["start 1", "start 2"]
    text = log.read_text()
    assert "slurm.sbatch: asked to stop" in text and "saved before the job was done" in text
    run = place.directory / "preempted"
    assert_undisturbed(run)
    attempts = list((run / "wandb" / "wandb").glob("offline-run-*"))
    assert len(attempts) == 2 and {path.name.rsplit("-", 1)[1] for path in attempts} == {
        (run / "wandb_run_id.txt").read_text()
    }
    for file in [log, *(file for file in run.rglob("*") if file.is_file())]:
        leaked = [name for name, secret in SECRETS.items() if secret.encode() in file.read_bytes()]
        assert not leaked, f"{file} holds {leaked}"


def test_a_job_outlives_a_node(place, assert_undisturbed):
    """All processes of the second node end at once, slurmd too; another node takes its place."""
    job = place.submit("bereaved", "launch/slurm.sbatch", *place.arguments("bereaved"), "--save-interval", "5")
    log = place.log("bereaved")
    place.cluster.wait(job, lambda _: log.is_file() and runs.iteration(log) >= 7, 300, log)
    place.cluster.kill(place.cluster.n2)
    place.cluster.wait(job, lambda state: state["JobState"] in ("PENDING", "REQUEUED"), 300, log)
    killed_at = runs.iteration(log)
    state = place.cluster.wait(job, lambda state: state["JobState"] == "COMPLETED", 300, log)
    place.cluster.start_node(place.cluster.n2)
    assert state["Restarts"] == "1" and len(starts(log)) == 2
    assert place.cluster.n3 in starts(log)[1]
    assert 7 <= killed_at < 24
    assert_undisturbed(place.directory / "bereaved")


def test_a_wrong_command_is_not_tried_again(place):
    """Nor is it, with QAD_HOME, looked for where the job runs."""
    command = ("launch/slurm.sbatch", "pretrain_qad.py", "--qad-teacher", "/absent")
    elsewhere = (f"--chdir={place.directory}",)
    job = place.submit("wrong", *command, options=elsewhere, NPROC_PER_NODE="1", QAD_HOME=str(ROOT))
    place.cluster.wait(job, lambda state: state["JobState"] == "FAILED", 300)
    text = place.log("wrong").read_text()
    assert "error: /absent: no hf/config.json" in text and len(starts(place.log("wrong"))) == 1
    assert not list(place.directory.glob(".qad-job-*")), "a job's small files outlive it"
