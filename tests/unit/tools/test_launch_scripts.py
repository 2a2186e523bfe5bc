"""The launch scripts report missing settings before they start anything. tests/slurm and tests/dist start jobs."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "SLURM_JOB_ID", "QAD_MODEL", "QAD_WORK", "QAD_STAGES")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=50)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("settings", [{}, {"MASTER_ADDR": "10.0.0.1"}])
def test_several_nodes_need_address_and_rank(settings):
    code, text = run("launch/torchrun.sh", "pretrain_qad.py", NNODES="2", **settings)
    missing = "NODE_RANK: NNODES=2 needs the rank of this node, 0 to 1" if settings else "MASTER_ADDR: NNODES=2 needs"
    assert code and missing in text


def test_usage_is_shown_without_a_program():
    assert run("launch/torchrun.sh")[0] == 2 and "NPROC_PER_NODE" in run("launch/torchrun.sh")[1]
    assert run("launch/slurm.sbatch", "pretrain_qad.py")[0] == 2  # not under SLURM


def test_unknown_interface_lists_existing_ones():
    code, text = run("launch/torchrun.sh", "tools/import_hf.py", QAD_INTERFACE="nosuch0")
    assert code and "error: QAD_INTERFACE=nosuch0: No such device. This machine has lo" in text


def test_join_timeout_limits_the_wait_for_node_0():
    """torch's own limit for reaching node 0's store is 60 seconds, longer than ``run`` waits."""
    absent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    code, text = run(
        "launch/torchrun.sh", "tools/import_hf.py", NNODES="2", NODE_RANK="1", QAD_JOIN_TIMEOUT="2", **absent
    )
    assert code and "RendezvousConnectionError" in text


def test_project_program_is_found_from_any_directory(tmp_path):
    code, text = run(f"{ROOT}/launch/torchrun.sh", "tools/import_hf.py", "--help", cwd=tmp_path, NPROC_PER_NODE="1")
    assert code == 0 and "usage: import_hf.py" in text


def triton_cache(tmp_path: Path) -> tuple[int, str]:
    """Exit status and output of environment.sh, with ``tmp_path`` as the directory for temporary files."""
    command = "set -e; source launch/environment.sh; echo $TRITON_CACHE_DIR"
    return run("bash", "-c", command, TMPDIR=str(tmp_path), TRITON_CACHE_DIR="", QAD_CACHE_DIR="")


def test_kernel_cache_is_private(tmp_path):
    cache = tmp_path / f"megatron_qad-{os.getuid()}"
    for _ in range(2):  # first it does not exist, then it exists with another mode
        assert triton_cache(tmp_path) == (0, f"{cache}/triton\n")
        assert cache.stat().st_mode & 0o777 == 0o700
        cache.chmod(0o777)


@pytest.mark.parametrize("kind", ["link", "file", "other owner"])
def test_cache_of_another_user_is_refused(tmp_path, kind):
    cache = tmp_path / f"megatron_qad-{os.getuid()}"
    if kind == "link":
        cache.symlink_to(tmp_path)
    elif kind == "file":
        cache.touch()
    else:
        cache.mkdir()
        if os.getuid():
            pytest.skip("changing the owner of a directory needs root")
        os.chown(cache, 12345, -1)
    code, text = triton_cache(tmp_path)
    assert code and f"error: {cache}: expected a directory that you own" in text and "set QAD_CACHE_DIR" in text


def test_pipeline_reports_missing_settings(tmp_path):
    assert "QAD_MODEL: Hugging Face directory" in run("launch/pipeline.sbatch", QAD_WORK=str(tmp_path))[1]
    settings = {"QAD_MODEL": str(tmp_path), "QAD_WORK": str(tmp_path / "work"), "QAD_STAGES": "export publish"}
    code, text = run("launch/pipeline.sbatch", **settings)
    assert code == 2 and "no stage 'publish'" in text and not (tmp_path / "work").exists()
