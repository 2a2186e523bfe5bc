"""launch/srun.sh turns SLURM's variables into ranks, and refuses what cannot be one. tests/slurm starts real tasks."""

import shutil
import socket
import sys

import pytest
from launch_scripts import run

with socket.create_server(("127.0.0.1", 0)) as _free:
    PORT = str(_free.getsockname()[1])
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROGRAM = ("-c", f"import os; print(*(os.environ[name] for name in {NAMES}))")
# Task 1 of node 1, of two nodes with eight tasks each.
TASK = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_JOB_ID": "123456"}
TASK |= {"SLURM_PROCID": "9", "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
TASK |= {"SLURM_STEP_NODELIST": "localhost,other", "CUDA_VISIBLE_DEVICES": ""}


def srun(**environment: str) -> tuple[int, str]:
    return run("launch/srun.sh", *PROGRAM, **TASK | environment)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, "9 16 1 8 localhost 23456"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "9 16 1 8 localhost 23456"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}, "9 16 1 8 localhost 23456"),
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "8"}, "9 16 0 8 localhost 23456"),
        ({"MASTER_PORT": "29400", "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, "9 16 1 8 localhost 29400"),
        ({"NPROC_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": ",".join("0123456789")}, "9 16 1 8 localhost 23456"),
    ],
)
def test_rank_of_a_task(environment, expected):
    assert srun(**environment) == (0, expected + "\n")


def test_step_on_one_node_stays_on_the_loopback_interface():
    """The name of the node is not used, because others can reach its address."""
    one = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "8"}
    one |= {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "n1", "MASTER_ADDR": "n1"}
    assert srun(**one) == (0, "1 8 1 8 127.0.0.1 23456\n")


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"SLURM_STEP_ID": ""}, "SLURM_STEP_ID: not set, so this is not a task of srun. Start it with srun, or use"),
        ({"TORCHELASTIC_RUN_ID": "qad"}, "started by torchrun and by srun. Use launch/torchrun.sh with one task on"),
        ({"RANK": "0"}, "RANK=0: SLURM's variables make it 9. Unset it; srun.sh sets it for each task."),
        ({"LOCAL_RANK": "9"}, "LOCAL_RANK=9: SLURM's variables make it 1."),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: SLURM's variables make it 16."),
        (
            {"NPROC_PER_NODE": "4"},
            "NPROC_PER_NODE=4: the step has 8 tasks on each node. Change it or --ntasks-per-node.",
        ),
        ({"SLURM_PROCID": "-1"}, "SLURM_PROCID=-1: expected a number. SLURM sets it; start the program with srun."),
        ({"SLURM_PROCID": "3"}, "SLURM_PROCID=3: expected 9 for task 1 of node 1, because tensor parallelism is for"),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "9,7"},
            "SLURM_STEP_TASKS_PER_NODE=9,7: expected equally many tasks on each node.",
        ),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "8 tasks on this node, but it has 8 GPUs for them, and this task sees 2."),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}, "8 tasks on this node, but it has 1 GPUs for them"),
        ({"CUDA_VISIBLE_DEVICES": ",".join("012345678")}, "8 tasks on this node see 9 GPUs. Start one task for each"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000: expected a number from 1 to 65535."),
        ({"MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR=127.0.0.1: not an address for several nodes. Unset it, or give"),
        (
            {"MASTER_ADDR": "a..b"},
            "MASTER_ADDR=a..b: label empty or too long. Give the host name or address of node 0.",
        ),
        ({"QAD_INTERFACE": "ib0"}, "MASTER_ADDR: not set. QAD_INTERFACE=ib0 needs the first node's address on that"),
        ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST: not set. Set MASTER_ADDR to the name of the step's first"),
    ],
)
def test_task_that_cannot_be_a_rank_is_refused(environment, message):
    code, text = srun(**environment)
    assert code and text.startswith(f"error: {message}") and text.count("\n") == 1, text


def test_missing_scontrol_is_reported(tmp_path):
    """As in a container."""
    for name in ("bash", "dirname", "env", "mkdir", "id", "chmod"):
        (tmp_path / name).symlink_to(shutil.which(name))
    (tmp_path / "python").symlink_to(sys.executable)
    code, text = srun(PATH=str(tmp_path), SLURM_STEP_NODELIST="n[1-2]")
    reason = "scontrol: No such file or directory"
    assert code == 2 and f"SLURM_STEP_NODELIST=n[1-2]: not expanded ({reason}). Set MASTER_ADDR" in text


FIRST = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
FIRST |= {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}


def test_port_of_the_store_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, text = srun(**FIRST, MASTER_PORT=port)
    message = (
        f"error: MASTER_PORT={port}: Address already in use on {socket.gethostname()}. Choose another MASTER_PORT.\n"
    )
    assert (code, text) == (2, message)


def test_store_serves_the_ranks():
    """The rank itself is a client, as under torchrun."""
    store = "import torch.distributed as d; s, rank, size = next(d.rendezvous('env://')); "
    store += "s.set('a', 'b'); print(s.get('a'), rank, size)"
    code, text = run("launch/srun.sh", "-c", store, **TASK | FIRST | {"MASTER_PORT": PORT})
    assert code == 0 and text.endswith("b'b' 0 2\n"), text
