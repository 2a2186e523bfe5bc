"""A job as one frozen object: flags, files and the models' configs, read and checked once.

Reading changes nothing: no process, directory or environment variable. What the configuration says is done later, by
``training``.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qad.config import refusals
from megatron_qad.config.machine_options import machine_options
from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.output_mode import OutputMode, OutputSizes, resolve_output_mode
from megatron_qad.config.parallelism import check_parallelism, teacher_virtual_stages, with_stages
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.config.vocabulary import check_same_vocabulary
from megatron_qad.config.yaml_file import expand, to_flags, without
from megatron_qad.data.data_options import DataOptions
from megatron_qad.distillation import LogitLoss, WeightedLosses, parse_loss
from megatron_qad.engine import Capabilities, QADError
from megatron_qad.engine.run_directory.iterations import holds_checkpoints
from megatron_qad.models.checkpoint_config import read_config
from megatron_qad.models.families import family_of, text_config
from megatron_qad.models.families.base import Family
from megatron_qad.quantization import policy

_VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank"
_IN_SAMPLES = ("--train-samples", "--lr-decay-samples", "--lr-warmup-samples")
"""How long a job trains, counted in samples: Megatron refuses them beside --train-iters."""
_OF_TRAINING = (
    *(*_IN_SAMPLES, "--save", "--load", "--tensorboard-dir"),
    *("--wandb-project", "--qad-keep-last", "--qad-keep-best", "--qad-spike-factor"),
)
"""What a job that trains nothing has no use for, or would count, save or log as training."""


@dataclass(frozen=True)
class ModelConfig:
    """One of the two models: where its weights are, and what its Hugging Face config says."""

    checkpoint: str
    """Directory made by tools/import_hf.py, or of a run."""
    hf: dict
    """``hf/config.json`` of it."""

    @property
    def family(self) -> Family:
        return family_of(self.hf)

    @property
    def num_layers(self) -> int:
        """Of the layer pattern: attentions, MLPs, expert and Mamba layers each count."""
        return len(self.family.layer_pattern(self.hf))

    @property
    def hidden_size(self) -> int:
        return text_config(self.hf)["hidden_size"]

    @property
    def vocab_size(self) -> int:
        """Without padding."""
        return text_config(self.hf)["vocab_size"]

    def shape(self, flags: MegatronFlags, virtual_stages: int) -> dict:
        """Megatron's options for the model, its pattern cut into the pipeline stages of ``flags``."""
        shape = self.family.megatron_args(self.hf)
        num_stages = flags.pipeline_model_parallel_size * virtual_stages
        shape["hybrid-layer-pattern"] = with_stages(shape["hybrid-layer-pattern"], num_stages)
        return shape


@dataclass(frozen=True)
class JobConfig:
    """What a job is asked to do, with every default settled. ``read_job_config`` makes it."""

    options: QADOptions
    flags: MegatronFlags
    megatron_argv: tuple[str, ...]
    """The command line that Megatron is to parse: ours, and before it what the machine and the model ask for."""
    world_size: int
    student: ModelConfig
    teacher: ModelConfig | None
    losses: WeightedLosses
    policy: policy.Policy
    formats: Mapping[str, str]
    """Format of every linear of the student, by the global name of its Megatron weight."""
    output_mode: OutputMode
    output_sizes: OutputSizes
    layer_spec: str
    """"te" or "local"."""
    job_dir: Path | None
    """Through which a batch script and the job talk."""

    @property
    def is_packed(self) -> bool:
        """Whether a row of data holds several documents that attention keeps apart."""
        return self.flags.dataloader_inter_document_masking

    @property
    def data_on_every_stage(self) -> bool:
        """Whether pipeline stages between the first and the last need the loss mask: not every loss is of logits."""
        return len(self.losses.terms_of_type(LogitLoss)) < len(self.losses.terms)

    @property
    def data_options(self) -> DataOptions:
        return DataOptions(
            calibration_samples=self.options.qad_calibration_samples,
            eval_iters=self.flags.eval_iters,
            pad_documents_to=self.options.qad_pad_documents_to or 1,
            checkpoints=(self.options.qad_student, self.options.qad_teacher),
        )

    @property
    def teacher_virtual_stages(self) -> int:
        return teacher_virtual_stages(self.teacher.num_layers, self.flags, self.options)

    @property
    def teacher_microbatches_per_pass(self) -> int:
        """Microbatches of the student that the teacher takes at a time."""
        return (self.options.qad_teacher_micro_batch_size or self.flags.micro_batch_size) // self.flags.micro_batch_size


def read_job_config(
    argv: Sequence[str],
    parser: argparse.ArgumentParser,
    machine: Capabilities,
    environ: Mapping[str, str],
    *,
    trains: bool = True,
) -> JobConfig:
    """Read and check a job's command line.

    The parts are laid one after the other, and the last one wins: what this machine needs, the model's shape,
    ``--config`` files, the user's flags. So every Megatron flag works unchanged.

    Args:
        argv: without the program's name.
        parser: knows the flags of ``QADOptions`` and of ``MegatronFlags`` (``engine.megatron_args.make_parser``).
        environ: read for ``WORLD_SIZE`` and ``QAD_JOB_DIR``.
        trains: False leaves out what concerns training alone, so that a tool may be given a job's flags.

    Raises:
        QADError: for what QAD itself checks; the parser exits as argparse does.
    """
    argv = expand(list(argv), parser)
    if not trains:
        argv = [*without(argv, *_OF_TRAINING), "--train-iters", "1"]  # Megatron wants to know for how long
    flags, options = _parse(argv, parser, machine)
    refusals.check_tokenizer(flags)
    losses = parse_loss(options.qad_loss, temperature=options.qad_temperature)
    refusals.check_option_values(options)
    refusals.check_sizes(flags, options)
    refusals.check_models(options, losses)
    student, teacher = _models(options)
    if flags.save is not None:
        refusals.refuse_model_directory(
            flags.save, {"--qad-teacher": options.qad_teacher, "--qad-student": student.checkpoint}
        )
    resumes = flags.load is None and flags.save is not None and not options.qad_ptq and holds_checkpoints(flags.save)
    if options.qad_ptq:
        refusals.refuse_training_run(flags.save)
        argv = without(argv, *_IN_SAMPLES)
        argv += to_flags({"train-iters": 1, "lr": 0.0, "min-lr": 0.0, "lr-warmup-iters": 0, "no-save-optim": True})
        flags, _ = _parse(argv, parser, machine)
    if resumes:
        argv += ["--load", flags.save]
        flags = dataclasses.replace(flags, load=flags.save)
    world_size = _world_size(flags, options, environ)
    refusals.check_router(flags, options)
    shapes = {
        who: model.family.megatron_args(model.hf) | {"mlp-widths": model.family.mlp_widths(model.hf)}
        for who, model in (("the student", student), ("the teacher", teacher))
        if model is not None
    }
    check_parallelism(flags, options, shapes, world_size)
    _check_batch(flags)
    if flags.global_batch_size is None:  # Megatron's own default
        ranks = world_size // flags.model_parallel_ranks
        flags = dataclasses.replace(flags, global_batch_size=flags.micro_batch_size * ranks)
    refusals.check_masters(flags)
    refusals.check_step(flags)
    refusals.check_wandb(flags)
    sizes = OutputSizes.from_flags(flags, student.vocab_size)
    for term in losses.terms_of_type(LogitLoss):
        term.loss.check(sizes.columns)
    refusals.check_hidden_losses(flags, options, losses, shapes)
    output_mode = resolve_output_mode(options, sizes, losses, None if teacher is None else teacher.hidden_size)
    refusals.check_saving(flags, options, has_teacher=teacher is not None)
    refusals.check_skipped(flags, options)
    chosen = policy.load(options.qad_policy, options.qad_policy_override)
    formats = policy.resolve(chosen, student.family.linears(student.hf), student.family.layer_kinds(student.hf))
    shape = student.shape(flags, flags.num_virtual_stages)
    before = to_flags({**machine_options(machine, options.qad_layer_spec), **shape})
    return JobConfig(
        options=_with_document_padding(options, flags),
        flags=flags,
        megatron_argv=(*before, *without(argv, _VIRTUAL_STAGES)),  # the pattern is cut into virtual stages instead
        world_size=world_size,
        student=student,
        teacher=teacher,
        losses=losses,
        policy=chosen,
        formats=formats,
        output_mode=output_mode,
        output_sizes=sizes,
        layer_spec=options.qad_layer_spec or machine.layer_spec,
        job_dir=_job_dir(options, environ),
    )


def _parse(
    argv: Sequence[str], parser: argparse.ArgumentParser, machine: Capabilities
) -> tuple[MegatronFlags, QADOptions]:
    given = argparse.Namespace(eval_iters=None)  # instead of the parser's default, which says that the user gave none
    parsed, _ = parser.parse_known_args([*to_flags(machine_options(machine)), *argv], given)
    return MegatronFlags.from_args(parsed), QADOptions.from_args(parsed)


def _models(options: QADOptions) -> tuple[ModelConfig, ModelConfig | None]:
    start = options.qad_student or options.qad_teacher
    student = ModelConfig(start, read_config(start))
    if options.qad_teacher is None:
        return student, None
    teacher = ModelConfig(options.qad_teacher, read_config(options.qad_teacher))
    check_same_vocabulary(start, text_config(student.hf), teacher.checkpoint, text_config(teacher.hf))
    return student, teacher


def _world_size(flags: MegatronFlags, options: QADOptions, environ: Mapping[str, str]) -> int:
    if not options.qad_dry_run or "WORLD_SIZE" in environ:
        return int(environ.get("WORLD_SIZE", 1))
    # A plan can be made anywhere: as if on one model-parallel group.
    of_experts = flags.expert_tensor_parallel_size or flags.tensor_model_parallel_size
    return flags.pipeline_model_parallel_size * math.lcm(
        flags.tensor_model_parallel_size * flags.context_parallel_size,
        of_experts * flags.expert_model_parallel_size,
    )


def _job_dir(options: QADOptions, environ: Mapping[str, str]) -> Path | None:
    found = options.qad_job_dir or environ.get("QAD_JOB_DIR")
    if not found:
        return None
    if not Path(found).is_dir():
        raise QADError(f"--qad-job-dir {found}: no such directory; the script that starts the job must make it")
    return Path(found)


def _check_batch(flags: MegatronFlags) -> None:
    for name in ("seq_length", "micro_batch_size"):
        if getattr(flags, name) is None:
            raise QADError(f"--{name.replace('_', '-')} is not given; a job needs it to know the shape of a microbatch")


def _with_document_padding(options: QADOptions, flags: MegatronFlags) -> QADOptions:
    if not flags.dataloader_inter_document_masking or options.qad_pad_documents_to is not None:
        return options
    cp = flags.context_parallel_size
    return dataclasses.replace(options, qad_pad_documents_to=2 * cp if cp > 1 else 1)
