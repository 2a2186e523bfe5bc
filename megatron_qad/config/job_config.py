"""Reads and checks the flags, files and model configs of a job once, into one frozen object.

Reading has no side effects: no process is started, no directory or environment variable is changed. The ``training``
subpackage later does what the configuration says.
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
from megatron_qad.config.parallelism import check_parallelism, split_into_stages, teacher_virtual_stages
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.config.vocabulary import check_same_vocabulary
from megatron_qad.config.yaml_file import expand, remove_flags, to_flags
from megatron_qad.data.data_options import DataOptions
from megatron_qad.distillation import LogitLoss, WeightedLosses, parse_loss
from megatron_qad.engine import Capabilities, QADError
from megatron_qad.engine.run_directory.iterations import holds_checkpoints
from megatron_qad.models.checkpoint_config import read_config
from megatron_qad.models.families import family_of, text_config
from megatron_qad.models.families.base import Family
from megatron_qad.quantization import policy

_VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank"
_SAMPLE_FLAGS = ("--train-samples", "--lr-decay-samples", "--lr-warmup-samples")
"""Flags that give the training length in samples; Megatron does not accept them together with --train-iters."""
_TRAINING_FLAGS = (
    *(*_SAMPLE_FLAGS, "--save", "--load", "--tensorboard-dir"),
    *("--wandb-project", "--qad-keep-last", "--qad-keep-best", "--qad-spike-factor"),
)
"""Flags that are removed for a job that does not train, because they would count, save or log training."""


@dataclass(frozen=True)
class ModelConfig:
    """Checkpoint directory and Hugging Face config of the student or the teacher."""

    checkpoint: str
    """Checkpoint directory, written by tools/import_hf.py or by a run."""
    hf: dict
    """Content of ``hf/config.json`` in the checkpoint directory."""

    @property
    def family(self) -> Family:
        return family_of(self.hf)

    @property
    def num_layers(self) -> int:
        """Length of the layer pattern: each attention, MLP, expert and Mamba layer counts as one."""
        return len(self.family.layer_pattern(self.hf))

    @property
    def hidden_size(self) -> int:
        return text_config(self.hf)["hidden_size"]

    @property
    def vocab_size(self) -> int:
        """Vocabulary size without padding."""
        return text_config(self.hf)["vocab_size"]

    def shape(self, flags: MegatronFlags, virtual_stages: int) -> dict:
        """Return Megatron's options for the model, with the layer pattern split into pipeline stages."""
        shape = self.family.megatron_args(self.hf)
        num_stages = flags.pipeline_model_parallel_size * virtual_stages
        shape["hybrid-layer-pattern"] = split_into_stages(shape["hybrid-layer-pattern"], num_stages)
        return shape


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
    output_mode: OutputMode
    output_sizes: OutputSizes
    layer_spec: str
    """Implementation of the layers: "te" or "local"."""
    job_dir: Path | None
    """Directory for messages between a batch script and the job; None turns them off."""

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

    Raises:
        QADError: one of QAD's own checks failed. Errors of the parser exit as in argparse.
    """
    argv = expand(list(argv), parser)
    if not trains:
        argv = [*remove_flags(argv, *_TRAINING_FLAGS), "--train-iters", "1"]  # Megatron needs a training length
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
    refusals.check_sequential_ptq(flags, options)
    if options.qad_ptq:
        refusals.refuse_training_run(flags.save)
        refusals.check_ptq(flags)
        argv = remove_flags(argv, *_SAMPLE_FLAGS)
        argv += to_flags({"train-iters": 1, "lr": 0.0, "min-lr": 0.0, "lr-warmup-iters": 0, "no-save-optim": True})
        flags, _ = _parse(argv, parser, machine)
    if resumes:
        argv += ["--load", flags.save]
        flags = dataclasses.replace(flags, load=flags.save)
    world_size = _world_size(flags, options, environ)
    refusals.check_router(flags, options)
    shapes = {
        role: model.family.megatron_args(model.hf) | {"mlp-widths": model.family.mlp_widths(model.hf)}
        for role, model in (("the student", student), ("the teacher", teacher))
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
    job_policy = policy.load(options.qad_policy, options.qad_policy_override)
    formats = policy.resolve(job_policy, student.family.linears(student.hf), student.family.layer_kinds(student.hf))
    refusals.check_blocks(flags, student.family.linears(student.hf), formats)
    shape = student.shape(flags, flags.num_virtual_stages)
    defaults = to_flags({**machine_options(machine, options.qad_layer_spec), **shape})
    return JobConfig(
        options=_with_document_padding(options, flags),
        flags=flags,
        megatron_argv=(*defaults, *remove_flags(argv, _VIRTUAL_STAGES)),  # the layer pattern gives the virtual stages
        world_size=world_size,
        student=student,
        teacher=teacher,
        losses=losses,
        policy=job_policy,
        formats=formats,
        output_mode=output_mode,
        output_sizes=sizes,
        layer_spec=options.qad_layer_spec or machine.layer_spec,
        job_dir=_job_dir(options, environ),
    )


def _parse(
    argv: Sequence[str], parser: argparse.ArgumentParser, machine: Capabilities
) -> tuple[MegatronFlags, QADOptions]:
    namespace = argparse.Namespace(eval_iters=None)  # overrides the parser's default: None if the user gave none
    parsed, _ = parser.parse_known_args([*to_flags(machine_options(machine)), *argv], namespace)
    return MegatronFlags.from_args(parsed), QADOptions.from_args(parsed)


def _models(options: QADOptions) -> tuple[ModelConfig, ModelConfig | None]:
    checkpoint = options.qad_student or options.qad_teacher
    student = ModelConfig(checkpoint, read_config(checkpoint))
    if options.qad_teacher is None:
        return student, None
    teacher = ModelConfig(options.qad_teacher, read_config(options.qad_teacher))
    check_same_vocabulary(checkpoint, text_config(student.hf), teacher.checkpoint, text_config(teacher.hf))
    return student, teacher


def _world_size(flags: MegatronFlags, options: QADOptions, environ: Mapping[str, str]) -> int:
    if not options.qad_dry_run or "WORLD_SIZE" in environ:
        return int(environ.get("WORLD_SIZE", 1))
    # A dry run works on any machine; without WORLD_SIZE the plan assumes one model-parallel group.
    expert_tensor_parallel_size = flags.expert_tensor_parallel_size or flags.tensor_model_parallel_size
    return flags.pipeline_model_parallel_size * math.lcm(
        flags.tensor_model_parallel_size * flags.context_parallel_size,
        expert_tensor_parallel_size * flags.expert_model_parallel_size,
    )


def _job_dir(options: QADOptions, environ: Mapping[str, str]) -> Path | None:
    directory = options.qad_job_dir or environ.get("QAD_JOB_DIR")
    if not directory:
        return None
    if not Path(directory).is_dir():
        raise QADError(
            f"--qad-job-dir {directory}: no such directory. The script that starts the job must create it first."
        )
    return Path(directory)


def _check_batch(flags: MegatronFlags) -> None:
    for name in ("seq_length", "micro_batch_size"):
        if getattr(flags, name) is None:
            raise QADError(f"--{name.replace('_', '-')} is not set; it gives the shape of a microbatch. Set it.")


def _with_document_padding(options: QADOptions, flags: MegatronFlags) -> QADOptions:
    if not flags.dataloader_inter_document_masking or options.qad_pad_documents_to is not None:
        return options
    cp = flags.context_parallel_size
    return dataclasses.replace(options, qad_pad_documents_to=2 * cp if cp > 1 else 1)
