"""Prints what launch/srun.sh gave to a task: its rank, the address of the first node, and its GPU."""

import os

names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or "none"
print(os.environ["SLURMD_NODENAME"].split("-")[0], *(os.environ[name] for name in names), "of", gpus, flush=True)
