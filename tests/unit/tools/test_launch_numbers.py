"""The launch scripts check numbers that others set before the shell calculates with them, which would run code."""

import os
import subprocess

import pytest
from launch_scripts import ROOT, run

SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1", "SLURM_JOB_NODELIST": "n1"}
TORCHRUN = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "NPROC_PER_NODE": "1"}
TORCHRUN_VARIABLES = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_PORT", "QAD_JOIN_TIMEOUT", "SLURM_CPUS_ON_NODE")
SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT", "QAD_MAX_CRASHES", "MASTER_PORT")
SLURM_VARIABLES += ("NPROC_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_CPUS_ON_NODE", "SLURM_NTASKS_PER_NODE")
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
CASES = [("launch/torchrun.sh", TORCHRUN, name) for name in TORCHRUN_VARIABLES]
CASES += [("launch/slurm.sbatch", SLURM, name) for name in SLURM_VARIABLES]
CASES += [("launch/srun.sh", SRUN, name) for name in ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS")]
CASES += [("launch/pipeline.sbatch", {"QAD_MODEL": ".", "QAD_WORK": "."}, "QAD_NODES")]


@pytest.mark.parametrize("script, settings, name", CASES, ids=[f"{script}: {name}" for script, _, name in CASES])
def test_no_variable_runs_a_command(tmp_path, script, settings, name):
    canary = tmp_path / "canary"
    settings = settings | {"SLURM_SUBMIT_DIR": str(ROOT), "QAD_JOB_ROOT": str(tmp_path)}
    if name == "SLURM_CPUS_ON_NODE":
        settings |= {"NPROC_PER_NODE": "1"}
    code, text = run(script, "prog.py", **settings | {name: f"a[$(touch {canary})]"})
    reported = "NPROC_PER_NODE" if name == "SLURM_GPUS_ON_NODE" else name
    assert code == 2 and text.startswith(f"error: {reported}=") and "expected a whole number from" in text, text
    assert text.count("\n") == 1 and not canary.exists()


def slurm_job(tmp_path, **settings) -> str:
    """Output of a job whose program is killed before its first step; no SLURM is there to queue it again."""
    for name, line in (("srun", "exit 137"), ("squeue", "echo RUNNING"), ("scontrol", "echo requeued")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    settings = SLURM | {"SLURM_SUBMIT_DIR": str(ROOT), "QAD_JOB_ROOT": str(tmp_path), **settings}
    return run("launch/slurm.sbatch", "prog.py", PATH=f"{tmp_path}:{os.environ['PATH']}", **settings)[1]


@pytest.mark.parametrize("content", ["a[$(touch CANARY)]", "", "three", "-1"])
def test_damaged_count_of_crashes_ends_the_job(tmp_path, content):
    """Otherwise the job would run the code, or crash forever."""
    job = tmp_path / ".qad-job-7"
    job.mkdir()
    (job / "crashes").write_text(content.replace("CANARY", str(tmp_path / "canary")))
    text = slurm_job(tmp_path)
    assert f"error: {job}/crashes=" in text and "crash 4, more than QAD_MAX_CRASHES" in text
    assert not (tmp_path / "canary").exists()


def test_crashes_are_counted(tmp_path):
    job = tmp_path / ".qad-job-7"
    job.mkdir(mode=0o700)
    for crashes in ("01", "2"):
        (job / "crashes").write_text(crashes)
        assert f"crash {int(crashes) + 1}, killed by signal 9; job 7 is queued again" in slurm_job(tmp_path)
    (job / "crashes").write_text("08")
    assert "crash 9, more than QAD_MAX_CRASHES" in slurm_job(tmp_path)


def test_job_directory_of_another_user_is_refused(tmp_path):
    """Its name can be predicted: a link in a shared directory would make the job create and remove files elsewhere."""
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / ".qad-job-7").symlink_to(other)
    text = slurm_job(tmp_path)
    assert f"error: {tmp_path}/.qad-job-7: expected a directory that you own, and not a link." in text
    assert not list(other.iterdir())


def test_numbers():
    values = ["8", "08", "010", "0", "20", "21", "", " 3", "3 ", "+3", "-3", "0x10", "1e3", "3\n4", "٣", "9" * 20, "a"]
    loop = 'source launch/integers.sh; for value; do integer X "$value" 1 20 2>/dev/null || echo refused; done'
    done = subprocess.run(["bash", "-c", loop, "bash", *values], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8", "8", "10", "refused", "20", *["refused"] * 12]


def test_batch_script_has_the_same_function():
    function = (ROOT / "launch/integers.sh").read_text().partition("integer() {")[2]
    assert function and f"integer() {{{function}" in (ROOT / "launch/slurm.sbatch").read_text()
