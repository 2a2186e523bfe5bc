"""Which checkpoint a job resumes from: the newest that is whole."""

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
    """Point ``--load`` at its newest whole checkpoint and clear away what a killed job left. Every rank calls this.

    The tracker's checkpoint is taken if it is whole; otherwise the newest whole one before it, and the tracker is moved
    there. A tracker that is missing, or was cut off while it was written, stands for the newest.

    Args:
        load, save: Megatron's ``--load`` and ``--save``.
        step: its ``--ckpt-step``; None or 0: the newest.

    Returns:
        The iteration to resume at; 0 if there is nothing to resume.

    Raises:
        QADError: there are checkpoints and none is whole, or the one that ``--ckpt-step`` names is not.
    """
    if save is not None:
        on_first_rank(lambda: atomic_checkpoint.clear_away(Path(save)))
    if load is None or not holds_checkpoints(load):
        return 0
    root = Path(load)
    named = read_tracker(root)
    if step or named == "release":
        manifest.verify_checkpoint(root / (f"iter_{step:07d}" if step else "release"))
        return step or 0
    refused = []
    for directory in saved_iterations(root):
        if is_number(named) and int(named) < iteration_of(directory):
            continue
        wrong = manifest.find_problems_across_ranks(directory)
        if not wrong:
            _move_tracker(root, directory, named, refused)
            return iteration_of(directory)
        refused.append(f"{directory.name} ({'; '.join(wrong[:3])})")
        print_rank_0(f"megatron_qad: WARNING: {root}: refusing {refused[-1]}")
    raise QADError(
        f"--load {root}: {TRACKER} says {named!r} and no checkpoint is whole: "
        f"{'; '.join(refused) or 'none is there'}. Take another directory, or empty this one to start anew"
    )


def read_tracker(root: Path) -> str:
    """What the tracker says; empty where it is missing."""
    file = root / TRACKER
    return file.read_text(errors="replace").strip() if file.is_file() else ""


def _move_tracker(root: Path, directory: Path, named: str, refused: list[str]) -> None:
    if named == str(iteration_of(directory)):
        return
    if not refused and is_number(named):
        print_rank_0(f"megatron_qad: WARNING: {root}: iter_{int(named):07d}, which {TRACKER} names, is not there")
    says = f"says {named!r}" if (root / TRACKER).is_file() else "is not there"
    print_rank_0(
        f"megatron_qad: WARNING: {root}: {TRACKER} {says}; resuming from {directory.name}, the newest whole one"
    )
    on_first_rank(lambda: manifest.write_atomically(root / TRACKER, str(iteration_of(directory))))


def latest_valid_checkpoint(root: Path, upto: int, but: set[int]) -> int | None:
    """The newest whole checkpoint of an iteration up to ``upto``, left out those of ``but``. Every rank calls this."""
    for directory in saved_iterations(root):
        iteration = iteration_of(directory)
        if iteration <= upto and iteration not in but and not manifest.find_problems_across_ranks(directory):
            return iteration
    return None
