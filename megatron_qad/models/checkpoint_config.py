"""Reading and checking the metadata of a checkpoint directory: the model's config and the job that saved it."""

from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.run_directory.config_file import model_config_file
from megatron_qad.engine.run_directory.run_files import JOB_FILE, read_record
from megatron_qad.engine.text_files import read_json
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.models.families import family_of

_WEIGHT_KEYS = ("formats", "kv_cache", "scale_rule", "scales")
"""Entries of a job's description that the saved weights depend on."""


def read_config(checkpoint: str | Path) -> dict:
    """Return ``config.json`` of the Hugging Face model from which a checkpoint directory was imported.

    Raises:
        QADError: the file is missing or has changed since it was written.
    """
    file = model_config_file(checkpoint)
    manifest.verify_file(file)
    return read_json(file, "Import the model again.")


def read_job(checkpoint: str | Path, iteration: Path | None = None) -> dict | None:
    """Return ``qad.json`` of a run, or None if the directory has none.

    "formats" maps the global Megatron weight name of every linear to its format. "kv_cache", "scale_rule" and "scales"
    (``quantization.scale_record``) are the other entries that an export depends on. "policy", "rules" and "loss" are
    the job's options, and "max_lr" bounds the distance by which a step moves a weight (None: unknown).

    Args:
        iteration: directory of one checkpoint. Its copy of the file must agree on the entries that the weights depend
            on.

    Raises:
        QADError: the file is damaged, or belongs to another model or to another job than the checkpoint.
    """
    job = read_record(checkpoint, JOB_FILE)
    if job is None:
        return None
    file = Path(checkpoint) / JOB_FILE
    formats = job.get("formats") if isinstance(job, dict) else None
    if not isinstance(formats, dict):
        raise QADError(f"{file}: no map 'formats'. Expected the file that pretrain_qad.py writes next to checkpoints.")
    config = read_config(checkpoint)
    linears = {linear.megatron for linear in family_of(config).linears(config)}
    if differ := sorted(formats.keys() ^ linears):
        what = "is not a linear of the model in hf/config.json" if differ[0] in formats else "has no format"
        raise QADError(f"{file}: {differ[0]!r} {what} ({len(differ)} names differ). The file belongs to another model.")
    if unknown := sorted(set(formats.values()) - set(FORMATS)):
        raise QADError(f"{file}: unknown format {unknown[0]!r}, expected one of {', '.join(FORMATS)}.")
    if iteration is not None and (iteration / JOB_FILE).is_file():
        saved = json_records.read(iteration / JOB_FILE)
        if differ := [key for key in _WEIGHT_KEYS if saved.get(key) != job.get(key)]:
            raise QADError(
                f"{file}: {differ[0]!r} differs from {iteration.name}, which was saved by another job. Restore the "
                f"file: cp {iteration / JOB_FILE} {file}"
            )
    return job
