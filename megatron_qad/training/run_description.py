"""The files that describe a run beside its checkpoints: what its job was, and the assets of its model."""

import os
import shutil
from pathlib import Path

from megatron_qad.config.job_config import JobConfig
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.run_directory.iterations import smoothing_record
from megatron_qad.engine.run_directory.run_files import JOB_FILE, RUN_RECORDS, SMOOTHING_FILE, read_record
from megatron_qad.models.checkpoint_config import read_job


def describe_run(config: JobConfig, save: Path, load: Path | None = None) -> None:
    """Put beside the checkpoints what exporting them needs: the Hugging Face assets and the format of every linear.

    Args:
        save: where the checkpoints go.
        load: where the job resumes from; None: it begins.

    Raises:
        QADError: ``--save`` holds checkpoints of a job with other formats, which ``qad.json`` must go on describing;
            ``--load`` is of a job that began with weights smoothed otherwise.
    """
    options, formats = config.options, config.formats
    for name in RUN_RECORDS:
        read_record(save, name)  # damage to what this job does not read would go on into its checkpoints
    job = read_job(save)
    if job is not None:
        for what, was, is_now in (
            ("KV cache", job.get("kv_cache", "bf16"), config.policy.kv_cache),
            ("--qad-weight-scale-rule", job.get("scale_rule", "max"), options.qad_weight_scale_rule),
        ):
            if was != is_now:
                raise QADError(
                    f"--save {save} holds checkpoints of {what} {was}; this job has {is_now}. Choose another directory "
                    f"or the {what} of before"
                )
        before = job["formats"]
        if differ := sorted(name for name in {**formats, **before} if formats.get(name) != before.get(name)):
            name = differ[0]
            raise QADError(
                f"--save {save} holds checkpoints in which {name} is {before.get(name)}; this job's policy makes it "
                f"{formats.get(name)} ({len(differ)} linears differ). Choose another directory or the policy of before"
            )
    start = Path(config.student.checkpoint)
    manifest.verify_directory(start / "hf", "config.json")
    shutil.copytree(start / "hf", save / "hf", dirs_exist_ok=True, copy_function=_copy_whole)
    manifest.verify_directory(save / "hf", "config.json")
    _describe_smoothing(start, save, load)
    job = {
        "policy": options.qad_policy,
        "rules": options.qad_policy_override,
        "loss": options.qad_loss,
        "kv_cache": config.policy.kv_cache,
        "scale_rule": options.qad_weight_scale_rule,
        "formats": dict(formats),
    }
    json_records.write(save / JOB_FILE, job)


def _describe_smoothing(start: Path, save: Path, load: Path | None) -> None:
    """Beside the checkpoints, how the weights that they descend from were smoothed."""
    record = smoothing_record(start)
    if load is not None and smoothing_record(load) != record:
        raise QADError(
            f"{load} is of a job whose weights were not smoothed as {start} is ({SMOOTHING_FILE}); it goes on as it "
            "began. Give the --qad-teacher or --qad-student of before, or begin in another --save directory"
        )
    if record is not None:
        json_records.write(save / SMOOTHING_FILE, record)
    else:
        (save / SMOOTHING_FILE).unlink(missing_ok=True)


def _copy_whole(source: str, target: str) -> None:
    """A file that appears when it is whole, and stays if it is there: a vision encoder has a gigabyte."""
    now, then = Path(source).stat(), Path(target).stat() if Path(target).is_file() else None
    if then is None or (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
        partial = f"{target}.partial"
        shutil.copy2(source, partial)  # its time, too
        os.replace(partial, target)
