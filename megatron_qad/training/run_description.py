"""Writes the files that describe a run next to its checkpoints: job settings, formats and Hugging Face assets."""

import os
import shutil
from pathlib import Path

from megatron_qad.config.job_config import JobConfig
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest, new_files
from megatron_qad.engine.run_directory.iterations import smoothing_record
from megatron_qad.engine.run_directory.run_files import JOB_FILE, RUN_RECORDS, SMOOTHING_FILE, read_record
from megatron_qad.models.checkpoint_config import read_job


def describe_run(config: JobConfig, save: Path, load: Path | None = None) -> None:
    """Write the files that an export needs to ``save``: Hugging Face assets and the format of each linear layer.

    Args:
        save: directory of the checkpoints.
        load: directory from which the job resumes, or None for a new job.

    Raises:
        QADError: ``save`` holds checkpoints of a job with other formats, which its ``qad.json`` must still describe;
            or the job of ``load`` started from differently smoothed weights.
    """
    options, formats = config.options, config.formats
    for name in RUN_RECORDS:
        read_record(save, name)  # a damaged record would be copied into the new checkpoints
    job = read_job(save)
    if job is not None:
        for setting, saved, current in (
            ("KV cache", job.get("kv_cache", "bf16"), config.policy.kv_cache),
            ("--qad-weight-scale-rule", job.get("scale_rule", "max"), options.qad_weight_scale_rule),
        ):
            if saved != current:
                raise QADError(
                    f"--save {save} holds checkpoints of {setting} {saved}; this job has {current}. Choose another "
                    f"directory, or {setting} {saved}."
                )
        saved_formats = job["formats"]
        names = {**formats, **saved_formats}
        if different := sorted(name for name in names if formats.get(name) != saved_formats.get(name)):
            name = different[0]
            raise QADError(
                f"--save {save} holds checkpoints in which {name} is {saved_formats.get(name)}; this job's policy "
                f"makes it {formats.get(name)} ({len(different)} linears differ). Choose another directory, or the "
                "policy of those checkpoints."
            )
    checkpoint = Path(config.student.checkpoint)
    manifest.verify_directory(checkpoint / "hf", "config.json")
    shutil.copytree(checkpoint / "hf", save / "hf", dirs_exist_ok=True, copy_function=_copy_atomically)
    manifest.verify_directory(save / "hf", "config.json")
    _describe_smoothing(checkpoint, save, load)
    job = {
        "policy": options.qad_policy,
        "rules": options.qad_policy_override,
        "loss": options.qad_loss,
        "kv_cache": config.policy.kv_cache,
        "scale_rule": options.qad_weight_scale_rule,
        "formats": dict(formats),
    }
    json_records.write(save / JOB_FILE, job)


def _describe_smoothing(checkpoint: Path, save: Path, load: Path | None) -> None:
    """Write the record of how the initial weights were smoothed to ``save``, or remove it if they were not."""
    record = smoothing_record(checkpoint)
    if load is not None and smoothing_record(load) != record:
        raise QADError(
            f"cannot resume from {load}: its job started from weights that were smoothed differently from {checkpoint} "
            f"({SMOOTHING_FILE}). Pass the original --qad-teacher or --qad-student, or a new --save directory."
        )
    if record is not None:
        json_records.write(save / SMOOTHING_FILE, record)
    else:
        (save / SMOOTHING_FILE).unlink(missing_ok=True)


def _copy_atomically(source: str, target: str) -> None:
    """Copy a file under a temporary name and rename it; skip files (up to gigabytes) that were copied before."""
    ours, copied = Path(source).stat(), Path(target).stat() if Path(target).is_file() else None
    if copied is None or (ours.st_size, ours.st_mtime_ns) != (copied.st_size, copied.st_mtime_ns):
        partial = f"{target}.partial"
        new_files.copy_new(Path(source), Path(partial))  # keeps the modification time, which is compared above
        os.replace(partial, target)
