"""launch/slurm.sbatch on a real cluster: jobs resume bit for bit after a preemption or a node failure."""

import runs
from place import ROOT

SECRETS = {"WANDB_API_KEY": "0d15ea5e" * 5, "HF_TOKEN": "hf_dontprintthisdontprintthis"}


def starts(log) -> list[str]:
    return [line for line in log.read_text().splitlines() if line.startswith("slurm.sbatch: job")]


def test_preempted_job_saves_and_resumes(place, assert_uninterrupted):
    """A job of higher priority takes all nodes: the batch script gets a signal, the ranks save, and SLURM requeues."""
    wandb = ["--wandb-project", "ci"]
    command = ["launch/slurm.sbatch", *place.arguments("preempted"), *wandb]
    job = place.submit("preempted", *command, WANDB_MODE="offline", **SECRETS)
    log = place.log("preempted")
    place.cluster.wait(job, lambda _: log.is_file() and runs.iteration(log) >= 1, 300, log)
    urgent = place.submit("urgent", "--wrap=true", options=("--partition=urgent", "--nodes=3", "--exclusive"))
    place.cluster.wait(urgent, lambda state: state["JobState"] == "COMPLETED", 300, log)
    assert 1 <= runs.iteration(log) < 24, "the job was not stopped during training"
    state = place.cluster.wait(job, lambda state: state["JobState"] == "COMPLETED", 300, log)

    assert state["Restarts"] == "1" and [line.split(", ")[1] for line in starts(log)] == ["start 1", "start 2"]
    text = log.read_text()
    assert "slurm.sbatch: stop requested" in text and "saved before the job was done" in text
    run = place.directory / "preempted"
    assert_uninterrupted(run)
    attempts = list((run / "wandb").glob("offline-run-*"))
    assert len(attempts) == 2 and {path.name.rsplit("-", 1)[1] for path in attempts} == {
        (run / "wandb_run_id.txt").read_text()
    }
    for file in [log, *(file for file in run.rglob("*") if file.is_file())]:
        leaked = [name for name, secret in SECRETS.items() if secret.encode() in file.read_bytes()]
        assert not leaked, f"{file} contains {leaked}"


def test_job_survives_node_failure(place, assert_uninterrupted):
    """All processes of the second node are killed, including slurmd; another node replaces it."""
    job = place.submit("node_failure", "launch/slurm.sbatch", *place.arguments("node_failure"), "--save-interval", "5")
    log = place.log("node_failure")
    place.cluster.wait(job, lambda _: log.is_file() and runs.iteration(log) >= 7, 300, log)
    place.cluster.kill(place.cluster.n2)
    place.cluster.wait(job, lambda state: state["JobState"] in ("PENDING", "REQUEUED"), 300, log)
    killed_at = runs.iteration(log)
    state = place.cluster.wait(job, lambda state: state["JobState"] == "COMPLETED", 300, log)
    place.cluster.start_node(place.cluster.n2)
    assert state["Restarts"] == "1" and len(starts(log)) == 2
    assert place.cluster.n3 in starts(log)[1]
    assert 7 <= killed_at < 24
    assert_uninterrupted(place.directory / "node_failure")


def test_wrong_command_is_not_retried(place):
    """With QAD_HOME, the program is not searched for in the directory where the job runs."""
    command = ("launch/slurm.sbatch", "pretrain_qad.py", "--qad-teacher", "/absent")
    elsewhere = (f"--chdir={place.directory}",)
    job = place.submit("wrong", *command, options=elsewhere, NPROC_PER_NODE="1", QAD_HOME=str(ROOT))
    place.cluster.wait(job, lambda state: state["JobState"] == "FAILED", 300)
    text = place.log("wrong").read_text()
    assert "error: /absent: no hf/config.json" in text and len(starts(place.log("wrong"))) == 1
    assert not list(place.directory.glob(".qad-job-*")), "the job's small files were not removed"
