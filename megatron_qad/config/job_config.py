"""Reads and checks the flags, files and model configs of a job once, into one frozen object.

Reading has no side effects: no process is started, no directory or environment variable is changed. The ``training``
subpackage later does what the configuration says.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_qad.config import launch_environment, refusals, saving_checks
from megatron_qad.config.command_line import check_flags_exist
from megatron_qad.config.data_flags import check_data_flags
from megatron_qad.config.job_defaults import IGNORED_BY_PTQ, PTQ_FLAGS, check_seq_length, default_flags
from megatron_qad.config.machine_options import machine_options
from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.model_config import ModelConfig
from megatron_qad.config.number_checks import check_numbers
from megatron_qad.config.output_mode import OutputMode, OutputSizes, resolve_output_mode
from megatron_qad.config.parallelism import check_parallelism, teacher_virtual_stages
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.config.schedule_checks import check_length, check_schedule
from megatron_qad.config.shape_flags import check_shape_flags
from megatron_qad.config.vision import images_of_data
from megatron_qad.config.vocabulary import check_same_vocabulary
from megatron_qad.config.yaml_file import expand, remove_flags, to_flags
from megatron_qad.data.data_options import DataOptions
from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.distillation import LogitLoss, WeightedLosses, parse_loss
from megatron_qad.engine import Capabilities
from megatron_qad.engine.run_directory.iterations import holds_checkpoints
from megatron_qad.formats.format_registry import UNQUANTIZED
from megatron_qad.models.checkpoint_config import read_config
from megatron_qad.models.families import text_config
from megatron_qad.quantization import policy
from megatron_qad.quantization.policy_warnings import policy_warnings
from megatron_qad.quantization.scale_settings import ScaleSetting

_VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank"
_TRAINING_FLAGS = (
    *("--train-samples", "--lr-decay-samples", "--lr-warmup-samples", "--save", "--load", "--tensorboard-dir"),
    *("--wandb-project", "--qad-keep-last", "--qad-keep-best", "--qad-spike-factor"),
)
"""Flags that are removed for a job that does not train, because they would count, save or log training."""
_STUDENT_FLAGS = (
    *("--qad-student", "--qad-policy", "--qad-weight-scale-rule", "--qad-loss", "--qad-temperature"),
    *("--qad-calibration-samples", "--qad-calibration-percentile", "--qad-calibration-headroom"),
)
"""Flags that are removed, with the one value of each, for a tool that names the student and its formats itself."""
_STUDENT_SWITCHES = ("--qad-policy-override", "--qad-ptq", "--qad-ptq-sequential")
"""The same, without a value or with several."""


@dataclass(frozen=True)
class JobConfig:
    """The complete configuration of a job, with all defaults resolved. Built by ``read_job_config``."""

    options: QADOptions
    flags: MegatronFlags
    megatron_argv: tuple[str, ...]
    """Command line for Megatron's parser: options of the machine and the model, followed by the user's flags."""
    world_size: int
    student: ModelConfig
    teacher: ModelConfig | None
    losses: WeightedLosses
    policy: policy.Policy
    formats: Mapping[str, str]
    """Format of each linear layer of the student, by the global name of its Megatron weight."""
    scales: Mapping[str, ScaleSetting]
    """How the scales of each weight with block scales are obtained, by the same name."""
    default_scales: ScaleSetting
    """How they are obtained where the policy does not say it (``--qad-weight-scale-rule``)."""
    output_mode: OutputMode
    output_sizes: OutputSizes
    layer_spec: str
    """Implementation of the layers: "te" or "local"."""
    job_dir: Path | None
    """Directory for messages between a batch script and the job; None turns them off."""
    images: ImageSettings | None = None
    """How the images in the data became tokens; None: the data has none."""
    notes: tuple[str, ...] = ()
    """What the log and the plan tell the user: values that were chosen, and warnings."""

    @property
    def is_packed(self) -> bool:
        """Whether a row of data holds several documents, each of which attends only to itself."""
        return self.flags.dataloader_inter_document_masking

    @property
    def runs_teacher(self) -> bool:
        """Whether the job builds its teacher. PTQ needs it only for validation."""
        return self.teacher is not None and not (self.options.qad_ptq and self.flags.eval_iters == 0)

    @property
    def data_on_every_stage(self) -> bool:
        """Whether middle pipeline stages need the loss mask, because some loss is not computed from logits."""
        return len(self.losses.terms_of_type(LogitLoss)) < len(self.losses.terms)

    @property
    def data_options(self) -> DataOptions:
        return DataOptions(
            calibration_samples=self.options.qad_calibration_samples,
            eval_iters=self.flags.eval_iters,
            pad_documents_to=self.options.qad_pad_documents_to or 1,
            vocab_size=self.student.vocab_size,
            is_ptq=self.options.qad_ptq,
            images=self.images,
            checkpoints=(self.options.qad_student, self.options.qad_teacher),
        )

    @property
    def teacher_virtual_stages(self) -> int:
        return teacher_virtual_stages(self.teacher.num_layers, self.flags, self.options)

    @property
    def teacher_microbatches_per_pass(self) -> int:
        """Number of the student's microbatches in one forward pass of the teacher."""
        return (self.options.qad_teacher_micro_batch_size or self.flags.micro_batch_size) // self.flags.micro_batch_size


def read_job_config(
    argv: Sequence[str],
    parser: argparse.ArgumentParser,
    machine: Capabilities,
    environ: Mapping[str, str],
    *,
    trains: bool = True,
    student: ModelConfig | None = None,
) -> JobConfig:
    """Read and check the command line of a job.

    The options of the machine, the shape of the model, ``--config`` files and the user's flags are concatenated in this
    order; the last value of an option wins. So every Megatron flag works unchanged.

        parser = make_parser(QADOptions)  # engine.megatron_args
        config = read_job_config(["--config", "job.yaml", "--lr", "1e-5"], parser, capabilities(), os.environ)
        print(config.options.qad_loss, config.flags.seq_length, config.formats["output_layer.weight"])

    Args:
        argv: command line without the program's name.
        parser: a parser that knows the flags of ``QADOptions`` and of ``MegatronFlags``.
        environ: environment variables; ``WORLD_SIZE`` and ``QAD_JOB_DIR`` are read.
        trains: False removes the flags that only concern training, so that a tool can take the flags of a job.
        student: the model of a tool that takes a job's flags, but whose model has its own formats and losses. The flags
            that choose them are removed, and the configuration quantizes nothing.

    Raises:
        QADError: a flag is unknown, or one of QAD's own checks failed.
    """
    argv = expand(list(argv), parser)
    check_flags_exist(argv, parser)
    if not trains:
        argv = [*remove_flags(argv, *_TRAINING_FLAGS), "--train-iters", "1"]  # Megatron needs a training length
    if student is not None:
        argv = [*_without_student_flags(argv), "--qad-policy", UNQUANTIZED.name]
    flags, options = _parse(argv, parser, machine)
    refusals.check_tokenizer(flags)
    losses = parse_loss(options.qad_loss, temperature=options.qad_temperature)
    refusals.check_option_values(options)
    refusals.check_models(options, losses)
    check_data_flags(flags)
    student, teacher = _models(options, student)
    models = [student] if teacher is None else [student, teacher]
    refusals.check_sequential_ptq(flags, options)
    if options.qad_ptq:
        refusals.check_ptq(flags)
    _check_save(flags, options, models)
    added, notes = _added_flags(flags, options, models, trains=trains)
    argv = [*remove_flags(argv, *(IGNORED_BY_PTQ if options.qad_ptq else ())), *to_flags(added)]
    flags, options = _parse(argv, parser, machine)
    world_size = launch_environment.world_size(flags, options, environ)
    shapes = _check_parallelism(flags, options, student, teacher, world_size)
    flags = _with_global_batch_size(flags, world_size)
    check_seq_length(flags.seq_length, {model.checkpoint: model.max_length for model in models})
    if trains:
        (check_length if flags.skip_train else check_schedule)(flags)
    refusals.check_masters(flags)
    refusals.check_step(flags)
    saving_checks.check_wandb(flags)
    sizes = OutputSizes.from_flags(flags, student.vocab_size)
    for term in losses.terms_of_type(LogitLoss):
        term.loss.check(sizes.columns)
    refusals.check_hidden_losses(flags, options, losses, shapes)
    output_mode = resolve_output_mode(options, sizes, losses, None if teacher is None else teacher.hidden_size)
    saving_checks.check_saving(flags, options, has_teacher=teacher is not None)
    refusals.check_skipped(flags, options)
    job_policy = policy.load(options.qad_policy, options.qad_policy_override)
    linears, layer_kinds = student.family.linears(student.hf), student.family.layer_kinds(student.hf)
    formats = policy.resolve(job_policy, linears, layer_kinds)
    default_scales = ScaleSetting.parse(options.qad_weight_scale_rule, "--qad-weight-scale-rule")
    scales = policy.resolve_scales(job_policy, linears, layer_kinds, default=default_scales)
    refusals.check_blocks(flags, linears, formats)
    refusals.check_headroom(options, formats)
    refusals.check_growth(losses, scales)
    shape = student.shape(flags, flags.num_virtual_stages)
    defaults = to_flags({**machine_options(machine, options.qad_layer_spec), **shape})
    argv = remove_flags(argv, _VIRTUAL_STAGES)  # the layer pattern gives the virtual stages
    check_shape_flags([*defaults, *argv], defaults, parser, student.num_blocks, student.checkpoint)
    return JobConfig(
        options=_with_document_padding(options, flags),
        flags=flags,
        megatron_argv=(*defaults, *argv),
        world_size=world_size,
        student=student,
        teacher=teacher,
        losses=losses,
        policy=job_policy,
        formats=formats,
        scales=scales,
        default_scales=default_scales,
        output_mode=output_mode,
        output_sizes=sizes,
        layer_spec=options.qad_layer_spec or machine.layer_spec,
        job_dir=launch_environment.job_dir(options, environ),
        images=images_of_data(flags, student),
        notes=(*notes, *(f"WARNING: {warning}." for warning in policy_warnings(linears, scales))),
    )


def _parse(
    argv: Sequence[str], parser: argparse.ArgumentParser, machine: Capabilities
) -> tuple[MegatronFlags, QADOptions]:
    namespace = argparse.Namespace(eval_iters=None)  # overrides the parser's default: None if the user gave none
    parsed, _ = parser.parse_known_args([*to_flags(machine_options(machine)), *argv], namespace)
    check_numbers(parsed, parser)
    return MegatronFlags.from_args(parsed), QADOptions.from_args(parsed)


def _added_flags(
    flags: MegatronFlags, options: QADOptions, models: Sequence[ModelConfig], *, trains: bool
) -> tuple[dict, list[str]]:
    """Return the flags that follow the user's, and notes for the user: defaults, PTQ's settings, where to resume."""
    max_lengths = {model.checkpoint: model.max_length for model in models}
    added, notes = default_flags(flags, options, max_lengths, trains=trains)
    if options.qad_ptq:
        added |= PTQ_FLAGS
    elif flags.load is None and flags.save is not None and holds_checkpoints(flags.save):
        added["load"] = flags.save
    return added, notes


def _check_save(flags: MegatronFlags, options: QADOptions, models: Sequence[ModelConfig]) -> None:
    if flags.save is None:
        return
    student = models[0].checkpoint
    saving_checks.refuse_model_directory(flags.save, {"--qad-teacher": options.qad_teacher, "--qad-student": student})
    if options.qad_dry_run:
        saving_checks.check_writable(flags.save)
    if options.qad_ptq:
        saving_checks.refuse_training_run(flags.save)


def _check_parallelism(
    flags: MegatronFlags, options: QADOptions, student: ModelConfig, teacher: ModelConfig | None, world_size: int
) -> dict[str, dict]:
    """Check the parallelism. Returns Megatron's options for each model."""
    refusals.check_router(flags, options)
    shapes = {
        role: model.family.megatron_args(model.hf) | {"mlp-widths": model.family.mlp_widths(model.hf)}
        for role, model in (("the student", student), ("the teacher", teacher))
        if model is not None
    }
    check_parallelism(flags, options, shapes, world_size)
    return shapes


def _with_global_batch_size(flags: MegatronFlags, world_size: int) -> MegatronFlags:
    if flags.global_batch_size is not None:
        return flags
    ranks = world_size // flags.model_parallel_ranks
    return dataclasses.replace(flags, global_batch_size=flags.micro_batch_size * ranks)  # Megatron's own default


def _without_student_flags(argv: Sequence[str]) -> list[str]:
    kept, is_removed = [], False
    for word in remove_flags(argv, *_STUDENT_FLAGS):
        if word.startswith("--"):
            is_removed = word.split("=")[0] in _STUDENT_SWITCHES
        if not is_removed:
            kept.append(word)
    return kept


def _models(options: QADOptions, student: ModelConfig | None) -> tuple[ModelConfig, ModelConfig | None]:
    if student is None:
        checkpoint = options.qad_student or options.qad_teacher
        student = ModelConfig(checkpoint, read_config(checkpoint))
    if options.qad_teacher is None:
        return student, None
    teacher = ModelConfig(options.qad_teacher, read_config(options.qad_teacher))
    check_same_vocabulary(student.checkpoint, text_config(student.hf), teacher.checkpoint, text_config(teacher.hf))
    return student, teacher


def _with_document_padding(options: QADOptions, flags: MegatronFlags) -> QADOptions:
    if not flags.dataloader_inter_document_masking or options.qad_pad_documents_to is not None:
        return options
    cp = flags.context_parallel_size
    return dataclasses.replace(options, qad_pad_documents_to=2 * cp if cp > 1 else 1)
