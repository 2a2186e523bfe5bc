"""A job that gets SIGTERM or SIGUSR1 on a rank, or a stop file, saves, exits with status 0, and resumes bit for bit."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest
import records
import tiny_job
import torch
from launch import ROOT, environment

FLAGS = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 6 --lr 1e-3 --min-lr 1e-4 --split "
    "80,20,0 --lr-decay-style cosine --eval-interval 4 --eval-iters 2 --log-interval 1 --qad-calibration-samples 16 "
    "--bf16 --use-distributed-optimizer --save-interval 100 --tensor-model-parallel-size 2 --sequence-parallel"
).split()


@pytest.fixture(scope="module")
def place(tmp_path_factory, server):
    directory = tmp_path_factory.mktemp("preemption")
    for role, noise in (("teacher", 0.0), ("student", 0.3)):
        tiny_job.write_hf(directory / f"hf_{role}", tiny_job.LLAMA, noise=noise)
    tiny_job.write_data(directory / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    models = [(f"{directory}/hf_{role}", f"{directory}/{role}", "bfloat16") for role in ("teacher", "student")]
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    return directory, server


def read_steps(record: Path) -> list[dict]:
    return records.read(record, 2, vocab_size=tiny_job.LLAMA["vocab_size"])


@pytest.mark.parametrize("how", ["signal", "file"])
def test_stopped_job_resumes_bit_for_bit(place, tmp_path, how):
    directory, server = place
    models = ["--qad-teacher", f"{directory}/teacher", "--qad-student", f"{directory}/student"]
    argv = [*models, "--data-path", f"{directory}/data", "--data-cache-path", f"{directory}/cache", *FLAGS]
    expected_log = server.run("training_jobs:train", 2, {"argv": argv, "record": str(tmp_path / "through")})
    expected = read_steps(tmp_path / "through")

    # The same command twice; in between, the stop file is removed, as a batch script does when it starts.
    job_dir = tmp_path / "job"
    job_dir.mkdir()
    argv += ["--save", str(tmp_path / "run"), "--qad-job-dir", str(job_dir)]
    request = {"step": 3, "file": str(job_dir / "stop") if how == "file" else None}
    first_log = server.run("preemption_jobs:train", 2, {"argv": argv, "record": str(tmp_path / "first")} | request)
    assert "asked to stop; saving after this step" in first_log
    assert sorted(file.name for file in job_dir.iterdir() if file.name != "stop") == ["stepped", "stopped"]
    (job_dir / "stop").unlink(missing_ok=True)
    second_log = server.run("training_jobs:train", 2, {"argv": argv, "record": str(tmp_path / "second")})

    first, second = read_steps(tmp_path / "first"), read_steps(tmp_path / "second")
    assert (len(first), len(second)) == (3, 3)
    for step, (a, b) in enumerate(zip(first + second, expected, strict=True), 1):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"]), step
        for key in ("quantized", "grads", "params", "masters", "amaxes"):
            assert all(torch.equal(a[key][name], b[key][name]) for name in b[key]), (step, key)
    validations = [
        [line for line in log.splitlines() if "validation at iteration" in line] for log in (second_log, expected_log)
    ]
    assert validations[0] == validations[1] and len(validations[0]) == 2


def test_torchrun_sh_survives_sigterm_to_all_its_processes(place, tmp_path):
    """As SLURM sends it at the end of a time limit: the agent must give its ranks time to save."""
    directory, _ = place
    command = [f"{ROOT}/launch/torchrun.sh", "pretrain_qad.py", "--qad-teacher", f"{directory}/teacher", *FLAGS]
    command += ["--data-path", f"{directory}/data", "--save", str(tmp_path / "run"), "--train-iters", "2000"]
    log = tmp_path / "log"
    with open(log, "w") as output:
        env = environment() | {"NPROC_PER_NODE": "2"}
        script = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        end = time.monotonic() + 300
        while "kl loss" not in log.read_text():
            assert script.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.1)
        processes = [psutil.Process(script.pid), *psutil.Process(script.pid).children(recursive=True)]
        assert len(processes) >= 4  # the script, the agent, two ranks
        for process in processes:
            process.terminate()
        assert script.wait(120) == 0, log.read_text()[-5000:]
    saved = int((tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text())
    assert 1 <= saved < 2000 and f"iteration {saved}/" in log.read_text()


def test_failed_rank_ends_soon(place, tmp_path):
    """Data workers ignore SIGTERM, which a rank sends to end them, so a failed rank must not wait for them."""
    directory, _ = place
    command = [f"{ROOT}/launch/torchrun.sh", "tests/dist/crashing_job.py", "--qad-teacher", f"{directory}/teacher"]
    command += [*FLAGS, "--data-path", f"{directory}/data", "--num-workers", "2"]
    log = tmp_path / "log"
    with open(log, "w") as output:
        env = environment() | {"NPROC_PER_NODE": "2"}
        script = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        end = time.monotonic() + 300
        while "the third step" not in log.read_text():
            assert script.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            time.sleep(0.1)
        try:
            assert script.wait(60) == 1  # 3 s on a quiet machine
        finally:
            for process in psutil.Process().children(recursive=True):
                if "crashing_job.py" in " ".join(process.cmdline()):
                    process.kill()


def test_ptq_never_resumes(place, tmp_path):
    """PTQ saves no optimizer state to resume from, so a second start calibrates again."""
    directory, server = place
    argv = ["--qad-teacher", f"{directory}/teacher", "--data-path", f"{directory}/data", *FLAGS, "--qad-ptq"]
    argv += ["--save", str(tmp_path / "ptq")]
    logs = [server.run("training_jobs:train", 2, {"argv": argv}) for _ in range(2)]
    kls = [[line for line in log.splitlines() if "validation at iteration" in line] for log in logs]
    assert kls[0] == kls[1] and len(kls[0]) == 1


def test_missing_job_directory_is_an_error(place, tmp_path):
    directory, server = place
    argv = ["--qad-teacher", f"{directory}/teacher", "--data-path", f"{directory}/data", *FLAGS]
    argv += ["--qad-job-dir", str(tmp_path / "absent")]
    output = server.run("training_jobs:train", 2, {"argv": argv}, fails=True)
    assert f"error: --qad-job-dir {tmp_path / 'absent'}: no such directory" in output
