"""The cluster, if this machine can have one; a tiny job; the same job undisturbed, which every other one must equal."""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests" / "dist")]

import tiny_job  # noqa: E402
from cluster import Cluster, Unavailable  # noqa: E402

TRAIN = """
tensor_model_parallel_size: 2
sequence-parallel: true
bf16: true
use-distributed-optimizer: true
seq-length: 32
micro-batch-size: 2
global-batch-size: 4
train-iters: 24
lr: 1.0e-3
min-lr: 1.0e-4
lr-decay-style: cosine
split: 80,20,0
eval-interval: 10
eval-iters: 1
save-interval: 100
log-interval: 1
tensorboard-log-interval: 1
qad-calibration-samples: 16
"""


@dataclass
class Place:
    """A directory with the tiny models and data, and the cluster whose nodes see it."""

    directory: Path
    cluster: Cluster

    def arguments(self, name: str) -> list[str]:
        """pretrain_qad.py's, for a run that saves to ``name``."""
        d = self.directory
        run = ["--save", f"{d}/{name}", "--tensorboard-dir", f"{d}/{name}/tensorboard"]
        models = ["--qad-teacher", f"{d}/teacher", "--qad-student", f"{d}/student"]
        data = ["--data-path", f"{d}/data", "--data-cache-path", f"{d}/cache"]
        return ["pretrain_qad.py", "--config", f"{d}/train.yaml", *models, *data, *run]

    def environment(self, **more: str) -> dict[str, str]:
        """Of a user whose shell has the project's Python first and whose nodes have two processes each."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        fixed = {"PATH": path, "PYTHONWARNINGS": "ignore", "QAD_JOB_ROOT": str(self.directory)}
        return fixed | {"NPROC_PER_NODE": "2"} | more

    def submit(self, name: str, *command: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """sbatch with the log ``name``.log; the job's number."""
        flags = ["--parsable", "--nodes=2", "--cpus-per-task=2", f"--chdir={ROOT}", f"--output={self.log(name)}"]
        return self.cluster.slurm(
            "sbatch", *flags, *options, *command, environment=self.environment(**environment), cwd=ROOT
        )

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"


@contextlib.contextmanager
def megatron():
    """This process as a group of one rank, which reading and writing checkpoints needs."""
    from megatron_qad.runtime import prepare

    prepare()
    import torch

    from megatron_qad.runtime.distributed import init_process_group

    init_process_group()
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.up()
    except Unavailable as reason:
        pytest.skip(f"no SLURM here: {reason}")
    except BaseException:
        cluster.down()
        raise
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def place(tmp_path_factory, cluster) -> Place:
    directory = tmp_path_factory.mktemp("jobs")
    with megatron():
        import torch

        from megatron_qad.checkpoint.import_hf import import_hf

        for who, noise in (("teacher", 0.0), ("student", 0.3)):
            hf = tiny_job.write_hf(directory / f"hf_{who}", tiny_job.LLAMA | {"dtype": "bfloat16"}, noise=noise)
            import_hf(hf, directory / who, torch.bfloat16)
    tiny_job.write_data(directory / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
    (directory / "train.yaml").write_text(TRAIN)
    return Place(directory, cluster)


@pytest.fixture(scope="session")
def undisturbed(place) -> tuple[Path, list[str]]:
    """The job started by torchrun.sh on both nodes, and the addresses on which its nodes listened meanwhile."""
    import runs

    nodes, logs, listening = (place.cluster.n1, place.cluster.n2), [], set()
    started = []
    for rank, node in enumerate(nodes):
        launch = {
            "NNODES": "2",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": place.cluster.addresses[nodes[0]],
            "QAD_INTERFACE": "eth0",
        }
        logs.append(place.log(f"torchrun{rank}"))
        command = place.cluster.command(node, f"{ROOT}/launch/torchrun.sh", *place.arguments("undisturbed"))
        with open(logs[-1], "w") as log:
            environment = {**os.environ, **place.environment(**launch)}
            started.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    while any(process.poll() is None for process in started):
        if runs.iteration(logs[1]):
            for node in nodes:
                sockets = place.cluster.run(node, "ss", "-Hltn").splitlines()
                listening |= {line.split()[3] for line in sockets} - {"0.0.0.0:6818"}  # slurmd's own
        time.sleep(0.5)
    codes = [process.returncode for process in started]
    assert codes == [0, 0], "\n".join(log.read_text()[-5000:] for log in logs)
    return place.directory / "undisturbed", sorted(listening)
