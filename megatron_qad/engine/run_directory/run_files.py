"""The small files beside a run's checkpoints or in an export, each written by one room and read by others.

Those that describe a run are records (``json_records``): each has a checksum of itself. Every checkpoint holds a copy
of them as they were when it was saved, by which a record that is missing is noticed, and can be restored.
"""

from pathlib import Path
from typing import Any

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's: the newest checkpoint."""
JOB_FILE = "qad.json"
"""What the job was: models, policy, loss."""
BEST_FILE = "best_checkpoints.json"
"""The checkpoints with the lowest validation KL."""
CALIBRATION_FILE = "calibration.json"
"""Experts' linears that saw too few tokens in calibration."""
EVENTS_FILE = "event_files.json"
"""What the TensorBoard event files were: in each checkpoint, and beside them when the job ended in order."""
START_TAG = "job/start"
"""The scalar that begins an event file: the number of the job's start, at the iteration where it goes on."""
LOAD_FILE = "expert_load.json"
"""How teacher and student spread tokens over their experts."""
IMPORT_FILE = "qad_import.json"
"""In an imported checkpoint: which Hugging Face model it was made of."""
EXPORT_FILE = "qad_export.json"
"""In an exported Hugging Face directory: which iteration of which checkpoint it was made of."""
SMOOTHING_FILE = "qad_smoothing.json"
"""In a checkpoint that tools/smooth.py wrote, and in those of jobs that began with it: how it was smoothed."""

RUN_RECORDS = (JOB_FILE, BEST_FILE, CALIBRATION_FILE, LOAD_FILE, SMOOTHING_FILE)
"""The records beside a run's checkpoints."""


def read_record(root: str | Path, name: str) -> Any:
    """The content of a record in a checkpoint directory; None if the run never wrote it.

    Raises:
        QADError: it is damaged, or it is missing and a checkpoint has a copy of it.
    """
    file = Path(root) / name
    copies = sorted(Path(root).glob(f"iter_*/{name}"))
    restore = f"cp {copies[-1]} {file} restores it as it was then" if copies else "Restore it from a copy"
    if not file.is_file():
        if copies:
            raise QADError(f"{file}: is missing, and {copies[-1].parent.name} was saved when it was there. {restore}")
        return None
    try:
        return json_records.read(file)
    except QADError as error:
        raise QADError(f"{error}. {restore}") from error


def record_text(root: str | Path, name: str) -> str | None:
    """The text of a record that goes into a checkpoint as its copy; None if there is no such record."""
    file = Path(root) / name
    # A record that was damaged while the job ran is copied as it is: it is noticed by whoever reads it.
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
