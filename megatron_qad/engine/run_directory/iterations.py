"""The saved iterations of a run directory: all of them, the newest, and the best.

Only names and small files are read; tensors are never opened.
"""

import re
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.run_files import (
    BEST_FILE,
    SELECTION_FILE,
    SMOOTHING_FILE,
    TRACKER,
    read_record,
)

_ITERATION = re.compile(r"iter_\d{7,}")
BEST_KEY = "kl_to_teacher"
"""The validation metric that ranks checkpoints."""


def iteration_dir(checkpoint: str | Path, iteration: int | str | None = None) -> Path:
    """Return the directory of one iteration inside a checkpoint directory.

    Args:
        iteration: a number, "best" (the lowest validation KL among the existing ones), "selected" (by
            ``megatron-qad select``), or None for the iteration that ``latest_checkpointed_iteration.txt`` names.

    Raises:
        QADError: the iteration does not exist, or the tracker is missing or damaged.

    Example::

        from megatron_qad.engine.run_directory.iterations import iteration_dir
        iteration_dir("runs/qad")  # the newest, such as runs/qad/iter_0000100
        iteration_dir("runs/qad", "best")
    """
    root = Path(checkpoint)
    if iteration is not None:
        named = {"best": best_iteration, "selected": selected_iteration}.get(str(iteration))
        directory = root / f"iter_{int(iteration) if named is None else named(root):07d}"
        if not (directory / ".metadata").is_file():
            available = ", ".join(sorted(path.name for path in root.glob("iter_*"))) or "none"
            raise QADError(f"{root}: {directory.name} is not a torch_dist checkpoint. Choose one of: {available}.")
        return directory
    tracker = root / TRACKER
    if not tracker.is_file():
        raise QADError(f"{root}: no {TRACKER}. Expected a checkpoint directory.")
    latest = tracker.read_text(errors="replace").strip()
    if latest != "release" and not is_number(latest):
        raise QADError(f"{tracker} contains {latest!r}, expected a number or 'release'. Resume the job to fix it.")
    directory = root / ("release" if latest == "release" else f"iter_{int(latest):07d}")
    if not (directory / ".metadata").is_file():
        raise QADError(f"{root}: {TRACKER} names {latest}, but {directory.name} is not a torch_dist checkpoint.")
    return directory


def iteration_to_read(checkpoint: str | Path, iteration: int | str | None = None) -> Path:
    """``iteration_dir`` for tools that export or report on a run: None must then be the newest saved iteration.

    Raises:
        QADError: the tracker names an older one: it is damaged, or the user set the run back.
    """
    directory = iteration_dir(checkpoint, iteration)
    saved = saved_iterations(checkpoint)
    if iteration is None and directory.name != "release" and directory != saved[0]:
        raise QADError(
            f"{checkpoint}: {TRACKER} names {iteration_of(directory)}, but {saved[0].name} is newer. Name the "
            f"iteration (--iteration {iteration_of(saved[0])}), or resume the job, which updates the tracker."
        )
    return directory


def saved_iterations(root: str | Path) -> list[Path]:
    """Return the directories of a run's saved iterations, newest first, valid or not."""
    directories = [path for path in Path(root).glob("iter_*") if _ITERATION.fullmatch(path.name) and path.is_dir()]
    return sorted(directories, key=iteration_of, reverse=True)


def iteration_of(directory: Path) -> int:
    """Return the iteration number in the name of a checkpoint directory."""
    return int(directory.name.removeprefix("iter_"))


def is_number(text: str) -> bool:
    """Whether the text of a tracker is an iteration number."""
    return text.isascii() and text.isdigit()


def validations(root: Path) -> list[dict]:
    """Return the ranked validations of the run in ``root``, best first; empty if there are none.

    Each has "iteration", the KL and, except in files of older versions, "num_tokens" and "tokens_sha256".
    """
    return read_record(root, BEST_FILE) or []


def validated_kl(root: Path) -> dict[int, float]:
    """Return the validation KL by iteration, best first."""
    return {entry["iteration"]: entry[BEST_KEY] for entry in validations(root)}


def best_iteration(root: Path) -> int:
    """Return the validated iteration with the lowest KL whose checkpoint exists."""
    # Removed ones are skipped; a damaged one is not, so that reading it fails by name.
    existing = [step for step in validated_kl(root) if (root / f"iter_{step:07d}").is_dir()]
    if not existing:
        raise QADError(f"{root}: no checkpoint with a validation ({BEST_FILE}). Name an iteration instead of 'best'.")
    return existing[0]


def selected_iteration(root: Path) -> int:
    """Return the iteration that ``megatron-qad select`` chose."""
    selection = read_record(root, SELECTION_FILE)
    if selection is None:
        raise QADError(f"{root}: no {SELECTION_FILE}. Run megatron-qad select --run {root}, or name an iteration.")
    return selection["iteration"]


def smoothing_record(checkpoint: str | Path) -> dict | None:
    """Return how a checkpoint's initial weights were smoothed (``megatron-qad smooth``); None if they were not."""
    return read_record(checkpoint, SMOOTHING_FILE)


def holds_checkpoints(root: str | Path) -> bool:
    """Whether a job would resume from ``root``: it has a tracker, or checkpoints whose tracker is lost."""
    return (Path(root) / TRACKER).is_file() or bool(saved_iterations(root))
