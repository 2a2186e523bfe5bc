"""The launch scripts report missing settings before they start anything. tests/slurm and tests/dist start jobs."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from launch_scripts import ROOT, run


@pytest.mark.parametrize("settings", [{}, {"MASTER_ADDR": "10.0.0.1"}])
def test_several_nodes_need_address_and_rank(settings):
    code, text = run("launch/torchrun.sh", "pretrain_qad.py", NNODES="2", **settings)
    missing = "NODE_RANK: NNODES=2 needs the rank of this node, 0 to 1" if settings else "MASTER_ADDR: NNODES=2 needs"
    assert code and missing in text


def test_usage_is_shown_without_a_program():
    assert run("launch/torchrun.sh")[0] == 2 and "NPROC_PER_NODE" in run("launch/torchrun.sh")[1]
    assert run("launch/slurm.sbatch", "pretrain_qad.py")[0] == 2  # not under SLURM


def test_unknown_interface_lists_existing_ones():
    nodes = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    code, text = run("launch/torchrun.sh", "tools/import_hf.py", QAD_INTERFACE="nosuch0", **nodes)
    assert code and "error: QAD_INTERFACE=nosuch0: No such device. This machine has lo" in text


def rendezvous_error(**settings: str) -> str:
    """Return the only line that one of two nodes prints when it cannot join the rendezvous."""
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "QAD_JOIN_TIMEOUT": "2"}
    code, text = run("launch/torchrun.sh", "tools/import_hf.py", **nodes | settings)
    assert code == 1 and text.startswith("error: ") and text.count("\n") == 1, text
    return text


def test_join_timeout_limits_the_wait_for_node_0():
    """torch's own limit for reaching node 0's store is 60 seconds, longer than ``run`` waits."""
    text = rendezvous_error(NODE_RANK="1", MASTER_PORT="9")
    assert "the rendezvous at 127.0.0.1:9 failed within 2 s (QAD_JOIN_TIMEOUT)" in text


def test_address_of_node_0_must_exist():
    text = rendezvous_error(NODE_RANK="1", MASTER_ADDR="a..b")
    assert "MASTER_ADDR=a..b: label empty or too long. Give the host name or address of node 0." in text


@pytest.mark.parametrize("interface", ["", pytest.param("lo", marks=pytest.mark.all)])
def test_port_in_use(interface):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        text = rendezvous_error(NODE_RANK="0", MASTER_PORT=str(port), QAD_INTERFACE=interface)
    assert f"cannot listen on 127.0.0.1:{port}: another process uses this port. Choose another MASTER_PORT" in text


def test_missing_python_is_reported(tmp_path):
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(shutil.which(name))
    code, text = run("launch/torchrun.sh", "tools/import_hf.py", PATH=str(tmp_path))
    assert code == 2 and text.startswith("error: no program named python. Activate the virtual environment")


def test_project_program_is_found_from_any_directory(tmp_path):
    code, text = run(f"{ROOT}/launch/torchrun.sh", "tools/import_hf.py", "--help", cwd=tmp_path, NPROC_PER_NODE="1")
    assert code == 0 and "usage: megatron-qad import" in text


def triton_cache(tmp_path: Path) -> tuple[int, str]:
    """Exit status and output of environment.sh, with ``tmp_path`` as the directory for temporary files."""
    command = "set -e; source launch/integers.sh; source launch/environment.sh; echo $TRITON_CACHE_DIR"
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


@pytest.mark.parametrize("settings", [{"SLURM_GPUS_ON_NODE": "8"}, {"NPROC_PER_NODE": "8"}])
def test_tasks_and_processes_of_a_node_must_agree(settings):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS_PER_NODE": "4", "SLURM_SUBMIT_DIR": str(ROOT)}
    code, text = run("launch/slurm.sbatch", "pretrain_qad.py", **job | settings)
    assert code == 2 and text.startswith("error: --ntasks-per-node=4, but 8 GPUs on each node (or NPROC_PER_NODE).")


def test_limit_of_address_space():
    code, text = run("bash", "-c", "ulimit -v 2000000; exec launch/torchrun.sh tools/import_hf.py")
    assert code == 2 and text.startswith("error: the limit of address space is 2000000 KiB") and text.count("\n") == 1


def test_gpus_that_nvidia_smi_does_not_list(tmp_path):
    """Without this, a job would use one of eight GPUs."""
    mounts = f"touch {tmp_path}/null {tmp_path}/nvidia0 && mount --bind /dev/null {tmp_path}/null && "
    command = ["unshare", "-rm", "bash", "-c", f'{mounts} mount --rbind {tmp_path} /dev && exec "$@"', "bash"]
    if run(*command, "true")[0]:
        pytest.skip("/dev cannot be replaced in a namespace here")
    code, text = run(*command, "launch/torchrun.sh", "tools/import_hf.py")
    assert code == 2 and text.startswith(
        "error: this machine has GPUs (/dev/nvidia*), but nvidia-smi does not list them"
    )


def test_pipeline_without_slurm(tmp_path):
    if shutil.which("sbatch"):
        pytest.skip("SLURM is installed")
    settings = {"QAD_MODEL": str(tmp_path), "QAD_WORK": str(tmp_path / "work")}
    code, text = run("launch/pipeline.sbatch", **settings)
    assert code == 2 and text.startswith("error: no program named sbatch.") and not (tmp_path / "work").exists()
