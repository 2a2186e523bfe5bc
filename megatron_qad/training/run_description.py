"""Writes the files that describe a run next to its checkpoints: job settings, formats and Hugging Face assets."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron.core import dist_checkpointing

from megatron_qad.config.job_config import JobConfig
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest, new_files
from megatron_qad.engine.run_directory.iterations import iteration_dir, smoothing_record
from megatron_qad.engine.run_directory.run_files import JOB_FILE, RUN_RECORDS, SMOOTHING_FILE, read_record
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.models.checkpoint_config import read_job
from megatron_qad.quantization.frozen_scales import carries_scales
from megatron_qad.quantization.scale_record import recorded_scales, scale_record
from megatron_qad.quantization.scale_settings import ScaleSetting

_GROUPED_EXPERTS = {"expert_parameters": "grouped"}
"""Entry of ``qad.json``: all local experts of a projection are one parameter. Older versions had one per expert."""


def describe_run(config: JobConfig, save: Path, load: Path | None = None, max_lr: float | None = None) -> None:
    """Write the files that an export needs to ``save``: Hugging Face assets and the format of each linear layer.

    Args:
        save: directory of the checkpoints.
        load: directory from which the job resumes, or None for a new job.
        max_lr: bound of the distance by which the job's optimizer moves a weight in one step; None if it has none.

    Raises:
        QADError: ``save`` holds checkpoints of a job with other formats, which its ``qad.json`` must still describe;
            or the job of ``load`` started from differently smoothed weights.
    """
    options, formats = config.options, config.formats
    for name in RUN_RECORDS:
        read_record(save, name)  # a damaged record would be copied into the new checkpoints
    job = read_job(save)
    if job is not None:
        saved, current = job.get("kv_cache", "bf16"), config.policy.kv_cache
        if saved != current:
            raise QADError(
                f"--save {save} holds checkpoints of KV cache {saved}; this job has {current}. Choose another "
                f"directory, or KV cache {saved}."
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
        if different := _different_scales(job, config.scales, str(save / JOB_FILE)):
            name, saved, current = different[0]
            raise QADError(
                f"--save {save} holds checkpoints in which {name} has the scales {saved}; this job has {current} "
                f"({len(different)} linears differ). Choose another directory, or --qad-weight-scale-rule and policy "
                "rules that give the scales of those checkpoints."
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
        **scale_record(config.scales, config.default_scales),
        "formats": dict(formats),
        "max_lr": _max_lr(max_lr, job, read_job(load) if load is not None else None),
        **_GROUPED_EXPERTS,
    }
    json_records.write(save / JOB_FILE, job)


def _max_lr(current: float | None, *earlier: dict | None) -> float | None:
    """Return the largest learning rate of a job and of those that it continues; None if one of them is unknown."""
    rates = [current, *(job.get("max_lr") for job in earlier if job is not None)]
    return None if None in rates else max(rates)


def check_scale_state(config: JobConfig, load: Path) -> None:
    """Check that the checkpoints of ``load`` carry the scales that this job reads from them.

    Raises:
        QADError: their job obtained the scales of a linear in another way.
    """
    carried = {
        name: setting
        for name, setting in config.scales.items()
        if carries_scales(FORMATS[config.formats[name]].weight, setting)
    }
    job = read_job(load) if carried else None
    if different := _different_scales(job or {"formats": {}}, carried, str(load / JOB_FILE)):
        name, saved, current = different[0]
        raise QADError(
            f"--load {load}: this job reads the scales of {name} ({current}) from the checkpoint, whose job "
            f"{f'had {saved}' if saved else 'did not store them'} ({len(different)} linears differ). Start from its "
            "weights with --qad-student, which computes the scales anew, or use the policy of that job."
        )


def _different_scales(
    job: dict, current: Mapping[str, ScaleSetting], where: str
) -> list[tuple[str, ScaleSetting | None, ScaleSetting]]:
    """Return (name, setting in ``job``, current setting) of the linears of ``current`` whose settings differ."""
    saved = recorded_scales(job, where)
    return [(name, saved.get(name), setting) for name, setting in current.items() if saved.get(name) != setting]


def check_expert_state(config: JobConfig, load: Path, iteration: int) -> None:
    """Check that the optimizer state of a model with experts can be loaded for this job's parameters.

    With --no-dist-ckpt-optim-fully-reshardable the distributed optimizer stores its flat buffers. Their sizes do not
    depend on the order of the parameters, so that state of separate experts would be loaded without an error, for the
    wrong weights. All other formats store the state by the name of the weight and can be loaded.

    Args:
        load: directory from which the job resumes.
        iteration: checkpoint whose optimizer state it loads.

    Raises:
        QADError: the checkpoint has flat buffers of a version in which every expert had its own parameters.
    """
    if "E" not in config.student.family.layer_pattern(config.student.hf):
        return
    directory = iteration_dir(load, iteration)
    common = dist_checkpointing.load_common_state_dict(str(directory))
    content = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    job = json_records.read(directory / JOB_FILE) if (directory / JOB_FILE).is_file() else {}
    if content.get("distrib_optim_sharding_type") == "dp_reshardable" and not _GROUPED_EXPERTS.items() <= job.items():
        raise QADError(
            f"--load {load}: the optimizer state of {directory.name} is in the order of separate parameters for every "
            "expert; this version has one parameter for all experts of a projection. Resume with the version that "
            "saved it, or pass --no-load-optim to continue from the weights alone."
        )


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
