"""Names of the small files in a run directory or an export, each written by one package and read by others.

Files that describe a run are records (``json_records``), each with a checksum of itself. Every checkpoint contains a
copy of them from the time of its save, so that a missing record is detected and can be restored.
"""

from pathlib import Path
from typing import Any

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records

TRACKER = "latest_checkpointed_iteration.txt"
"""Megatron's tracker file, which names the newest checkpoint."""
JOB_FILE = "qad.json"
"""Description of the job: models, policy, loss."""
BEST_FILE = "best_checkpoints.json"
"""The checkpoints with the lowest validation KL."""
SELECTION_FILE = "selection.json"
"""The checkpoint that megatron-qad select chose, and why."""
EVENTS_FILE = "event_files.json"
"""State of the TensorBoard event files: in each checkpoint, and in the run directory after a normal end of the job."""
METRICS_FILE = "metrics.jsonl"
"""Every scalar of TensorBoard's event files, one row per step."""
START_TAG = "job/start"
"""The first scalar of an event file: the number of the job's start, at the iteration where training resumes."""
LOAD_FILE = "expert_load.json"
"""Distribution of tokens over the experts of teacher and student."""
IMPORT_FILE = "qad_import.json"
"""Source of an imported checkpoint: the Hugging Face model, or an iteration that Megatron saved."""
EXPORT_FILE = "qad_export.json"
"""Source of an exported Hugging Face directory: the checkpoint and its iteration."""
CALIBRATION_FILE = "calibration.json"
"""The amaxes of inputs, keys and values from which an export's scales were computed."""
SMOOTHING_FILE = "qad_smoothing.json"
"""How megatron-qad smooth smoothed the weights: in its output, and in checkpoints of jobs that started from it."""

RUN_RECORDS = (JOB_FILE, BEST_FILE, LOAD_FILE, SMOOTHING_FILE)
"""Names of the records that describe a run."""


def read_record(root: str | Path, name: str) -> Any:
    """Return the content of a record in a checkpoint directory; None if the run never wrote it.

    Raises:
        QADError: the record is damaged, or it is missing although a checkpoint has a copy of it.
    """
    file = Path(root) / name
    copies = sorted(Path(root).glob(f"iter_*/{name}"))
    restore = f"Restore the copy: cp {copies[-1]} {file}" if copies else "Restore it from a copy."
    if not file.is_file():
        if copies:
            raise QADError(f"{file}: is missing, but {copies[-1].parent.name} has a copy of it. {restore}")
        return None
    try:
        return json_records.read(file)
    except QADError as error:
        raise QADError(f"{str(error).rstrip('.')}. {restore}") from error


def record_text(root: str | Path, name: str) -> str | None:
    """Return the text of a record, to be copied into a checkpoint; None if there is no such record."""
    file = Path(root) / name
    # A record that was damaged while the job ran is copied unchanged: reading it reports the damage.
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
