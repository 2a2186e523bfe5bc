"""Which iterations a run directory holds, and which of them is the newest or the best.

Reads names and small files; the tensors are never opened.
"""

import re
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.run_files import BEST_FILE, SMOOTHING_FILE, TRACKER, read_record

_ITERATION = re.compile(r"iter_\d{7,}")
BEST_KEY = "kl_to_teacher"
"""The metric of a validation by which checkpoints are ranked."""


def iteration_dir(checkpoint: str | Path, iteration: int | str | None = None) -> Path:
    """The directory of one iteration inside a checkpoint directory.

    Args:
        iteration: a number, "best" (of those that are there, by validation KL) or None for what
            ``latest_checkpointed_iteration.txt`` names.
    """
    root = Path(checkpoint)
    if iteration is not None:
        found = root / f"iter_{best_iteration(root) if iteration == 'best' else int(iteration):07d}"
        if not (found / ".metadata").is_file():
            there = ", ".join(sorted(path.name for path in root.glob("iter_*"))) or "none"
            raise QADError(f"{root}: {found.name} is not a torch_dist checkpoint; there are: {there}")
        return found
    tracker = root / TRACKER
    if not tracker.is_file():
        raise QADError(f"{root}: no {TRACKER}; expected a checkpoint directory")
    latest = tracker.read_text(errors="replace").strip()
    if latest != "release" and not is_number(latest):
        raise QADError(f"{tracker} says {latest!r}, expected a number or 'release'; resuming the job mends it")
    found = root / ("release" if latest == "release" else f"iter_{int(latest):07d}")
    if not (found / ".metadata").is_file():
        raise QADError(f"{root}: {TRACKER} says {latest}, but {found.name} is not a torch_dist checkpoint")
    return found


def iteration_to_read(checkpoint: str | Path, iteration: int | str | None = None) -> Path:
    """``iteration_dir`` for what reads a run and writes something of it: None is then the newest that is there.

    Raises:
        QADError: the tracker names an older one. Either it is damaged, or the run was set back on purpose.
    """
    found = iteration_dir(checkpoint, iteration)
    saved = saved_iterations(checkpoint)
    if iteration is None and found.name != "release" and found != saved[0]:
        raise QADError(
            f"{checkpoint}: {TRACKER} says {iteration_of(found)}, and {saved[0].name} is newer. Name the iteration "
            f"(--iteration {iteration_of(saved[0])}), or let the job go on, which settles it"
        )
    return found


def saved_iterations(root: str | Path) -> list[Path]:
    """Directories of a run's saved iterations, the newest first, whole or not."""
    found = [path for path in Path(root).glob("iter_*") if _ITERATION.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=iteration_of, reverse=True)


def iteration_of(directory: Path) -> int:
    """The iteration that a checkpoint's directory is named by."""
    return int(directory.name.removeprefix("iter_"))


def is_number(text: str) -> bool:
    """Whether a tracker's text is an iteration."""
    return text.isascii() and text.isdigit()


def validations(root: Path) -> list[dict]:
    """The ranked validations of the run that saves in ``root``, best first: "iteration", KL and, but in files of older
    versions, "num_tokens"; empty if it has not validated."""
    return read_record(root, BEST_FILE) or []


def validated_kl(root: Path) -> dict[int, float]:
    """Validation KL by iteration, best first."""
    return {entry["iteration"]: entry[BEST_KEY] for entry in validations(root)}


def best_iteration(root: Path) -> int:
    """The validated iteration with the lowest KL whose checkpoint is there."""
    # Removed ones are left out; a damaged one is not, so that it is named instead of passed over.
    there = [step for step in validated_kl(root) if (root / f"iter_{step:07d}").is_dir()]
    if not there:
        raise QADError(f"{root}: no checkpoint with a validation ({BEST_FILE}); name its iteration instead of 'best'")
    return there[0]


def smoothing_record(checkpoint: str | Path) -> dict | None:
    """How the weights that a checkpoint descends from were smoothed (``tools/smooth.py``); None: not."""
    return read_record(checkpoint, SMOOTHING_FILE)


def holds_checkpoints(root: str | Path) -> bool:
    """Whether a job would resume from ``root``: a tracker is there, or checkpoints that lost theirs."""
    return (Path(root) / TRACKER).is_file() or bool(saved_iterations(root))
