"""Runs the launch scripts without the settings of the surrounding shell."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "GLOO_SOCKET_IFNAME")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> tuple[int, str]:
    """Return the exit status and the output of a command whose paths start at the project's directory."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("QAD_", "SLURM_"))}
    clean = {name: value for name, value in clean.items() if name not in _VARIABLES}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=50)
    return done.returncode, done.stdout + done.stderr
