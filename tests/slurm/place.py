"""The tiny job of the SLURM tests: its files, its submission, and a process group for reading checkpoints."""

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]

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
    """A directory with the tiny models and data, and the cluster whose nodes can read it."""

    directory: Path
    cluster: Cluster

    def arguments(self, name: str) -> list[str]:
        """Return the arguments of pretrain_qad.py for a run that saves to ``name``."""
        d = self.directory
        run = ["--save", f"{d}/{name}", "--tensorboard-dir", f"{d}/{name}/tensorboard"]
        models = ["--qad-teacher", f"{d}/teacher", "--qad-student", f"{d}/student"]
        data = ["--data-path", f"{d}/data", "--data-cache-path", f"{d}/cache"]
        return ["pretrain_qad.py", "--config", f"{d}/train.yaml", *models, *data, *run]

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the environment of a user: the project's Python comes first, and each node runs two processes."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        fixed = {"PATH": path, "PYTHONWARNINGS": "ignore", "QAD_JOB_ROOT": str(self.directory)}
        return fixed | {"NPROC_PER_NODE": "2"} | variables

    def submit(self, name: str, *command: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submit a job that logs to ``name``.log, and return its ID."""
        flags = ["--parsable", "--nodes=2", "--cpus-per-task=2", f"--chdir={ROOT}", f"--output={self.log(name)}"]
        return self.cluster.slurm(
            "sbatch", *flags, *options, *command, environment=self.environment(**environment), cwd=ROOT
        )

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"


@contextlib.contextmanager
def megatron():
    """Make this process a process group of one rank, which reading and writing checkpoints requires."""
    from megatron_qad.engine import init_runtime

    init_runtime()
    import torch

    from megatron_qad.engine.distributed import init_process_group

    init_process_group()
    yield
    torch.distributed.destroy_process_group()
