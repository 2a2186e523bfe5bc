"""What a job that is started again goes on with: the newest checkpoint of its ``--save`` directory, its wandb run.

Megatron's checkpoint holds the rest: weights, masters, optimizer, scheduler, random states and the number of samples
seen, from which the data's order follows.
"""

import argparse
import os
import secrets
from pathlib import Path

from megatron_qad.engine.run_directory import manifest
from megatron_qad.training.checkpoints import holds_checkpoints


def load_flags(early: argparse.Namespace) -> list[str]:
    """``--load`` for a job that names none and whose ``--save`` holds a checkpoint; calibration alone never resumes."""
    if early.load is None and early.save is not None and not early.qad_ptq and holds_checkpoints(early.save):
        return ["--load", early.save]
    return []


def continue_wandb_run(early: argparse.Namespace) -> None:
    """Give every start of one ``--save`` directory the same wandb run. ``WANDB_RUN_ID``, if set, wins.

    Only on the last rank, the one that Megatron lets write, and before Megatron parses, which starts the run.
    """
    is_last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if not early.wandb_project or early.save is None or not is_last:
        return
    file = Path(early.save) / "wandb_run_id.txt"
    name = ""
    try:
        name = file.read_text().strip() if file.is_file() else ""
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"megatron_qad: ERROR: {file}: {error}. This start is a wandb run of its own", flush=True)
    else:
        if not name:  # no file, or one that a full disk left empty
            name = os.environ.get("WANDB_RUN_ID", secrets.token_hex(4))
            manifest.write_or_say(file, name)  # else the next start is a wandb run of its own
    os.environ.setdefault("WANDB_RUN_ID", name or secrets.token_hex(4))
    os.environ.setdefault("WANDB_RESUME", "allow")
