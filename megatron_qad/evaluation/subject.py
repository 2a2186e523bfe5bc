"""The evaluated model: a run, an imported checkpoint, or an exported directory, quantized as its own files say."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model

from megatron_qad.checkpoint.exported_model import ExportedModel, exported_config
from megatron_qad.config.model_config import ModelConfig
from megatron_qad.engine.distributed import on_rank_0
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.iterations import iteration_of, iteration_to_read, validations
from megatron_qad.engine.run_directory.run_files import JOB_FILE
from megatron_qad.formats.format_registry import UNQUANTIZED
from megatron_qad.models.builder import build_chunks, freeze
from megatron_qad.models.checkpoint_config import read_config, read_job
from megatron_qad.models.weight_loading import fill_weights, load_quantizers, load_weights
from megatron_qad.quantization.scale_record import recorded_scales
from megatron_qad.training.job import QADJob
from megatron_qad.training.models import model_config


@dataclass(frozen=True)
class Subject:
    """A model to evaluate. Built by ``find_subject`` from its small files alone."""

    directory: Path
    config: dict
    """The model's Hugging Face config."""
    iteration: int | None = None
    """Iteration of a run. None for imported checkpoints and exported directories."""
    job: Mapping = field(default_factory=dict)
    """``qad.json`` of a run. Empty for others."""
    is_export: bool = False

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(str(self.directory), self.config)

    def validated(self, tokens_sha256: str) -> float | None:
        """Return the KL of the run's own validation of this iteration on the same tokens, if its record has one."""
        if self.iteration is None:
            return None
        entries = {entry["iteration"]: entry for entry in validations(self.directory)}
        entry = entries.get(self.iteration, {})
        return entry["kl_to_teacher"] if entry.get("tokens_sha256") == tokens_sha256 else None


def find_subject(directory: str | Path, iteration: int | str | None = None) -> Subject:
    """Find out what ``directory`` holds.

    Args:
        iteration: of a run: a number, "best" or None for the newest.

    Raises:
        QADError: neither a checkpoint directory nor an exported one, or no such iteration.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file() and not (directory / "hf" / "config.json").is_file():
        if iteration is not None:
            raise QADError(f"--iteration {iteration}: {directory} is an exported directory, which holds one. Omit it.")
        return Subject(directory, exported_config(directory), is_export=True)
    config = read_config(directory)
    saved = iteration_to_read(directory, iteration)
    job = read_job(directory, saved)
    return Subject(directory, config, None if saved.name == "release" else iteration_of(saved), job or {})


def build_subject(job: QADJob, subject: Subject) -> list[torch.nn.Module]:
    """Return the frozen chunks of the model, which compute with its quantized weights, inputs and KV cache. Collective.

    Args:
        job: a job whose student is ``subject.model``; its configuration gets the formats of the model.

    Raises:
        QADError: the files are damaged, or the run was saved before its calibration.
    """
    exported = on_rank_0(lambda: ExportedModel.open(subject.directory)) if subject.is_export else None
    _set_formats(job, subject, exported)
    chunks = build_chunks(model_config(job.config, job.args, subject.model))
    inner = unwrap_model(chunks)
    if exported is not None:
        fill_weights(inner, exported.read, subject.directory)
        activations = job.quantize_activations(inner)
        activations.fix_scales(exported.input_scales(), str(subject.directory))
        return [freeze(chunk) for chunk in chunks]
    load_weights(inner, subject.directory, iteration=subject.iteration)
    activations = job.quantize_activations(inner)
    activations.expect_amax(device=torch.cuda.current_device())
    weights = job.quantize_weights(inner)
    if subject.job:
        load_quantizers(inner, subject.directory, iteration=subject.iteration)
    if not activations.calibrated:
        raise QADError(
            f"{subject.directory}: iteration {subject.iteration} was saved before calibration. Give another."
        )
    weights.quantize_()
    return [freeze(chunk) for chunk in chunks]


def describe_formats(job: QADJob) -> str:
    """Return the formats of the model, such as "28 nvfp4, 1 bf16, KV cache fp8"."""
    counts = ", ".join(f"{n} {fmt}" for fmt, n in Counter(job.config.formats.values()).most_common())
    kv_cache = job.config.policy.kv_cache
    return counts if kv_cache == UNQUANTIZED.name else f"{counts}, KV cache {kv_cache}"


def _set_formats(job: QADJob, subject: Subject, exported: ExportedModel | None) -> None:
    config, scales = job.config, {}
    if exported is not None:
        formats, kv_cache = exported.formats, exported.kv_cache
    elif subject.job:
        formats, kv_cache = subject.job["formats"], subject.job.get("kv_cache", UNQUANTIZED.name)
        scales = recorded_scales(subject.job, str(subject.directory / JOB_FILE))
    else:
        return
    policy = dataclasses.replace(config.policy, kv_cache=kv_cache)
    job.config = dataclasses.replace(config, formats=formats, scales=scales, policy=policy)
