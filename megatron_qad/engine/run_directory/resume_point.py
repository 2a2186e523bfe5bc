"""Selects the checkpoint that a job resumes from: the newest valid one."""

from pathlib import Path

from megatron.training import print_rank_0

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import atomic_checkpoint, manifest
from megatron_qad.engine.run_directory.atomic_checkpoint import on_first_rank
from megatron_qad.engine.run_directory.iterations import (
    holds_checkpoints,
    is_number,
    iteration_of,
    saved_iterations,
)
from megatron_qad.engine.run_directory.run_files import TRACKER


def select_resume_checkpoint(load: str | None, save: str | None, step: int | None) -> int:
    """Select the newest valid checkpoint of ``--load`` and remove leftovers of a killed job. Every rank calls this.

    Selects the checkpoint that the tracker names if it is valid, otherwise the newest valid one before it, and updates
    the tracker. If the tracker is missing or truncated, the newest valid checkpoint is selected.

    Args:
        load, save: Megatron's ``--load`` and ``--save``.
        step: its ``--ckpt-step``. None or 0 means the newest.

    Returns:
        The iteration to resume at; 0 if there is nothing to resume.

    Raises:
        QADError: there are checkpoints but none is valid, or the one that ``--ckpt-step`` names is damaged.
    """
    if save is not None:
        on_first_rank(lambda: atomic_checkpoint.clear_away(Path(save)))
    if load is None or not holds_checkpoints(load):
        return 0
    root = Path(load)
    tracked = read_tracker(root)
    if step or tracked == "release":
        manifest.verify_checkpoint(root / (f"iter_{step:07d}" if step else "release"))
        return step or 0
    refused = []
    for directory in saved_iterations(root):
        if is_number(tracked) and int(tracked) < iteration_of(directory):
            continue
        problems = manifest.find_problems_across_ranks(directory)
        if not problems:
            _update_tracker(root, directory, tracked, refused)
            return iteration_of(directory)
        refused.append(f"{directory.name} ({'; '.join(problems[:3])})")
        print_rank_0(f"megatron_qad: WARNING: {root}: refusing {refused[-1]}")
    raise QADError(
        f"--load {root}: {TRACKER} contains {tracked!r}, but no valid checkpoint was found: "
        f"{'; '.join(refused) or 'there is none'}. Use another directory, or empty this one to start from scratch."
    )


def read_tracker(root: Path) -> str:
    """Return the text of the tracker; empty if it is missing."""
    file = root / TRACKER
    return file.read_text(errors="replace").strip() if file.is_file() else ""


def _update_tracker(root: Path, directory: Path, tracked: str, refused: list[str]) -> None:
    if tracked == str(iteration_of(directory)):
        return
    if not refused and is_number(tracked):
        print_rank_0(f"megatron_qad: WARNING: {root}: iter_{int(tracked):07d}, which {TRACKER} names, does not exist")
    state = f"contains {tracked!r}" if (root / TRACKER).is_file() else "is missing"
    print_rank_0(
        f"megatron_qad: WARNING: {root}: {TRACKER} {state}; resuming from {directory.name}, the newest valid one"
    )
    on_first_rank(lambda: manifest.write_atomically(root / TRACKER, str(iteration_of(directory))))


def latest_valid_checkpoint(root: Path, upto: int, rejected: set[int]) -> int | None:
    """Return the newest valid iteration up to ``upto`` that is not ``rejected``, or None. Every rank calls this."""
    for directory in saved_iterations(root):
        iteration = iteration_of(directory)
        if iteration <= upto and iteration not in rejected and not manifest.find_problems_across_ranks(directory):
            return iteration
    return None
