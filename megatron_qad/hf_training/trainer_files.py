"""The files that QADTrainer writes next to a checkpoint of transformers: what an export needs besides the tensors.

They are those of Megatron's runs: ``hf/`` has config.json and the tokenizer of the model that training began from, and
``qad.json`` the formats and scale settings. The tensors stay in transformers' ``model.safetensors``: masters under
their usual names, and the buffers of ``QuantizedLinear``.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from megatron_qad.checkpoint.import_hf import copy_assets
from megatron_qad.checkpoint.trainer_checkpoint import SAVED_BY
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.run_directory.run_files import EXPORT_FILE, JOB_FILE
from megatron_qad.hf_training.quantize_model import quantization_of
from megatron_qad.models.checkpoint_config import read_job
from megatron_qad.quantization.scale_record import recorded_scales, scale_record


def write_files(
    directory: Path, model: PreTrainedModel, *, loss: str, max_lr: float | None, num_steps: int, tokenizer=None
) -> None:
    """Write ``hf/`` and ``qad.json`` to a checkpoint of transformers.

    Args:
        loss: the training loss.
        max_lr: largest learning rate of the job if it bounds the distance by which a step moves a weight, as with Adam.
        num_steps: number of updates so far.
        tokenizer: saved to ``hf/`` if the model was built from a config, without a directory that has one.

    Raises:
        QADError: ``directory`` has another ``hf/``, which is not overwritten.
    """
    quantization, assets = quantization_of(model), directory / "hf"
    if assets.exists() and not (assets / manifest.FILE).is_file():
        raise QADError(f"{assets}: exists, and QADTrainer did not write it. Save the model to another directory.")
    (directory / JOB_FILE).unlink(missing_ok=True)  # written last: without it the checkpoint is not complete
    shutil.rmtree(assets, ignore_errors=True)
    if quantization.source is not None:
        copy_assets(quantization.source, assets)
    else:
        for part in (model.config, model.generation_config, tokenizer):
            if part is not None:
                part.save_pretrained(assets)
    manifest.write_manifest(assets)
    job = {
        "saved_by": SAVED_BY,
        "policy": quantization.policy.name,
        "rules": [str(rule) for rule in quantization.policy.rules],
        "loss": loss,
        "kv_cache": quantization.policy.kv_cache,
        **scale_record(quantization.scales, quantization.default_scales),
        "formats": quantization.formats,
        "max_lr": max_lr,
        "num_steps": num_steps,
        "smoothing": _smoothing(quantization.source),
    }
    json_records.write(directory / JOB_FILE, job)


def check_same_job(directory: Path, model: PreTrainedModel) -> None:
    """Check that a checkpoint to resume from has the formats and scale settings of ``model``.

    Raises:
        QADError: they differ, or QADTrainer did not write the checkpoint.
    """
    job: dict[str, Any] | None = read_job(directory) if (directory / "hf").is_dir() else None
    if job is None or job.get("saved_by") != SAVED_BY:
        raise QADError(f"{directory}: no {JOB_FILE} of QADTrainer. Resume from a checkpoint that QADTrainer has saved.")
    quantization = quantization_of(model)
    saved = (job["formats"], recorded_scales(job, str(directory / JOB_FILE)))
    for what, found, current in zip(
        ("format", "scales"), saved, (quantization.formats, quantization.scales), strict=True
    ):
        if differ := sorted(name for name in current if found.get(name) != current[name]):
            name = differ[0]
            raise QADError(
                f"{directory}: {name} has the {what} {found.get(name)}, but {current[name]} in this model "
                f"({len(differ)} differ). Quantize the model with the policy and scales of the checkpoint."
            )


def _smoothing(source: Path | None) -> str | None:
    """Return what identifies the smoothed weights that training began from; None if they were not smoothed."""
    record = source / EXPORT_FILE if source is not None else None
    if record is None or not record.is_file():
        return None
    return json_records.read(record).get("smoothing")
