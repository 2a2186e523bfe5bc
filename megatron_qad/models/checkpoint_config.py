"""What a checkpoint directory says about itself, checked: the model's config, and the job that saved there."""

import json
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.run_directory.run_files import JOB_FILE, read_record
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.models.families import family_of

_OF_THE_WEIGHTS = ("formats", "kv_cache", "scale_rule")
"""What of a job's description the saved weights depend on."""


def read_config(checkpoint: str | Path) -> dict:
    """``config.json`` of the Hugging Face model that a checkpoint directory was imported from.

    Raises:
        QADError: there is none, or it is not the file that was written.
    """
    file = Path(checkpoint) / "hf" / "config.json"
    if not file.is_file():
        raise QADError(
            f"{checkpoint}: no hf/config.json; expected a checkpoint directory that import_hf.py or pretrain_qad.py "
            "wrote"
        )
    manifest.verify_file(file)
    return json.loads(file.read_text(encoding="utf-8"))


def read_job(checkpoint: str | Path, iteration: Path | None = None) -> dict | None:
    """``qad.json`` of a run; None where the directory has none.

    "formats" has the format of every linear by its global Megatron weight name, "kv_cache" and "scale_rule" say the
    rest of what an export depends on; "policy", "rules" and "loss" are as the job was given them.

    Args:
        iteration: directory of a checkpoint; its own copy must agree on what the weights depend on.

    Raises:
        QADError: it is damaged, of another model, or of another job than the checkpoint.
    """
    job = read_record(checkpoint, JOB_FILE)
    if job is None:
        return None
    file = Path(checkpoint) / JOB_FILE
    formats = job.get("formats") if isinstance(job, dict) else None
    if not isinstance(formats, dict):
        raise QADError(f"{file}: no map 'formats'; expected the file that pretrain_qad.py writes beside checkpoints")
    config = read_config(checkpoint)
    linears = {linear.megatron for linear in family_of(config).linears(config)}
    if differ := sorted(formats.keys() ^ linears):
        what = "is no linear of hf/config.json's model" if differ[0] in formats else "has no format"
        raise QADError(f"{file}: {differ[0]!r} {what} ({len(differ)} names differ). It is of another model")
    if unknown := sorted(set(formats.values()) - set(FORMATS)):
        raise QADError(f"{file}: unknown format {unknown[0]!r}; expected one of {', '.join(FORMATS)}")
    if iteration is not None and (iteration / JOB_FILE).is_file():
        saved = json_records.read(iteration / JOB_FILE)
        if differ := [key for key in _OF_THE_WEIGHTS if saved.get(key) != job.get(key)]:
            raise QADError(
                f"{file}: its {differ[0]} is not that of {iteration.name}, which was saved by another job. Restore it: "
                f"cp {iteration / JOB_FILE} {file}"
            )
    return job
