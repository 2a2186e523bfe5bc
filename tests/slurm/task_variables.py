"""Prints what launch/srun.sh gave to a task: its rank, its GPU, and the host whose store it reached."""

import os
import socket

names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=30).close()
gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
print(os.environ["SLURMD_NODENAME"].split("-")[0], *(os.environ[name] for name in names), "of", gpus, flush=True)
