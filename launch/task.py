"""Makes a task of srun a rank: ``task.py PROGRAM.py ARGUMENTS``, called by srun.sh.

It sets torch.distributed's variables from those of SLURM. The task of rank 0 also starts the store through which the
ranks find each other, in a process that ends with it: a store that torch opens in the rank itself would listen on every
network interface. To the ranks it looks like the store of torchrun's agent.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from agent import address_of, check_resolves, quiet_stores

from megatron_qad.engine.processes import end_with_parent


def ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE of this task. Exits if they would not be torchrun's."""
    rank, size = _integer(environ, "SLURM_PROCID"), _integer(environ, "SLURM_STEP_NUM_TASKS")
    node, local = _integer(environ, "SLURM_NODEID"), _integer(environ, "SLURM_LOCALID")
    layout = environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # "8(x4)": eight on each of four nodes
    found = re.fullmatch(r"(\d+)(\(x\d+\))?", layout)
    if found is None:
        _exit(f"SLURM_STEP_TASKS_PER_NODE={layout}: expected equally many tasks on each node. Add --ntasks-per-node.")
    on_node = int(found[1])
    if rank != node * on_node + local:
        _exit(
            f"SLURM_PROCID={rank}: expected {node * on_node + local} for task {local} of node {node}, because tensor "
            "parallelism is for neighboring ranks on one node. Add --distribution block."
        )
    if (expected := environ.get("NPROC_PER_NODE")) and expected != str(on_node):
        _exit(f"NPROC_PER_NODE={expected}: the step has {on_node} tasks on each node. Change it or --ntasks-per-node.")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return dict(zip(names, map(str, (rank, size, local_rank(environ, local, on_node), on_node)), strict=True))


def local_rank(environ: Mapping[str, str], local: int, on_node: int) -> int:
    """Return the index of this task's GPU among those that it sees; without GPUs, the index of the task on its node.

    With --gpus-per-task=1 or --gpu-bind=single:1 each task sees one GPU, which is its GPU 0.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        num_visible = num_on_node = _num_gpus()
    else:
        num_visible = len([name for name in visible.split(",") if name not in ("", _NONE)])
        num_on_node = max(num_visible, on_node)  # unless SLURM says it: a script may have given each task another GPU
    num_on_node = _integer(environ, "SLURM_GPUS_ON_NODE", str(num_on_node))
    if num_visible > on_node and not environ.get("NPROC_PER_NODE"):
        _exit(
            f"{on_node} tasks on this node see {num_visible} GPUs. Start one task for each (--ntasks-per-node="
            f"{num_visible}), or set NPROC_PER_NODE={on_node} to use fewer."
        )
    if num_visible == 0 or num_visible >= on_node:
        return local
    if num_visible > 1 or num_on_node < on_node:
        _exit(
            f"{on_node} tasks on this node, but it has {num_on_node} GPUs for them, and this task sees {num_visible}. "
            "Request one GPU for each task (--gpus-per-node), and let it see one or all of them (--gpu-bind)."
        )
    return 0


_NONE = "NoDevFiles"
"""SLURM's value of CUDA_VISIBLE_DEVICES for tasks without GPUs."""


def _num_gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return len(done.stdout.splitlines()) if done.returncode == 0 else 0


def endpoint(environ: Mapping[str, str]) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT, which are the same for all tasks of the step."""
    job = _integer(environ, "SLURM_JOB_ID")
    port = _integer(environ, "MASTER_PORT", str(20000 + job % 10000))
    if not 0 < port < 65536:
        _exit(f"MASTER_PORT={port}: expected a number from 1 to 65535.")
    if environ.get("QAD_INTERFACE") == "lo":  # environment.sh: a step on one node
        address = "127.0.0.1"
    elif not (address := environ.get("MASTER_ADDR")):
        if interface := environ.get("QAD_INTERFACE"):
            _exit(f"MASTER_ADDR: not set. QAD_INTERFACE={interface} needs the first node's address on that interface.")
        address = first_node(environ.get("SLURM_STEP_NODELIST", ""))
    elif address == "localhost" or address.startswith("127."):
        _exit(f"MASTER_ADDR={address}: not an address for several nodes. Unset it, or give that of the first node.")
    check_resolves(["--rdzv-endpoint", f"{address}:{port}"])
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def first_node(nodes: str) -> str:
    """Return the first host of a list such as ``n[1-4,7],login``. The names are expanded by scontrol."""
    if not nodes:
        _exit("SLURM_STEP_NODELIST: not set. Set MASTER_ADDR to the name of the step's first node.")
    if "[" not in nodes:
        return nodes.partition(",")[0]
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        problem = done.stderr.strip()
    except OSError as error:  # in a container
        problem = f"scontrol: {error.strerror}"
    if problem or not done.stdout:
        _exit(f"SLURM_STEP_NODELIST={nodes}: not expanded ({problem}). Set MASTER_ADDR to the name of the first node.")
    return done.stdout.split()[0]


def check_contradictions(environ: Mapping[str, str], variables: Mapping[str, str]) -> None:
    """Exit if this task is under torchrun, or if a variable that torchrun would set has another value."""
    if "TORCHELASTIC_RUN_ID" in environ:
        _exit("started by torchrun and by srun. Use launch/torchrun.sh with one task on each node, or launch/srun.sh.")
    for name, value in variables.items():
        if environ.get(name, value) != value and name not in ("MASTER_ADDR", "MASTER_PORT"):
            _exit(
                f"{name}={environ[name]}: SLURM's variables make it {value}. Unset it; srun.sh sets it for each task."
            )


def serve_store(port: int) -> None:
    """Open the store in a child that ends with this process. Exits if the port is in use."""
    interface = os.environ.get("QAD_INTERFACE")
    try:
        if interface:
            listening = socket.create_server((address_of(interface), port))
        elif socket.has_dualstack_ipv6():
            listening = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            listening = socket.create_server(("", port))
    except OSError as error:
        _exit(f"MASTER_PORT={port}: {os.strerror(error.errno)} on {socket.gethostname()}. Choose another MASTER_PORT.")
    parent = os.getpid()
    if os.fork():
        return listening.close()
    end_with_parent(parent)
    quiet_stores()
    from torch.distributed import TCPStore

    host = listening.getsockname()[0] if interface else "localhost"
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    while store:
        signal.pause()


def forked_by_main_thread(parent: int) -> bool:
    """Whether ``parent`` forked this process in its main thread.

    Only then may this process ask to end with its parent: the kernel watches the thread. SLURM 22.05's does.
    """
    try:
        return str(os.getpid()) in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return False


def _integer(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name) or default
    if not re.fullmatch(r"[0-9]{1,15}", text):
        _exit(f"{name}={text}: expected a number. SLURM sets it; start the program with srun.")
    return int(text)


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    variables = ranks(os.environ) | endpoint(os.environ)
    check_contradictions(os.environ, variables)
    os.environ.update(variables, TORCHELASTIC_USE_AGENT_STORE="True")
    if variables["RANK"] == "0":
        serve_store(int(variables["MASTER_PORT"]))
    parent = os.getppid()
    os.environ["QAD_AGENT_PID"] = str(parent) if forked_by_main_thread(parent) else ""
    rank = str(Path(__file__).with_name("rank.py"))
    os.execv(sys.executable, [sys.executable, rank, *sys.argv[1:]])


if __name__ == "__main__":
    main()
