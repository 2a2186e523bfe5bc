"""Builds the models of a job: the config from which Megatron builds the student, and the frozen teacher."""

import argparse
import copy
from pathlib import Path

import torch
from megatron.training import print_rank_0
from megatron.training.argument_utils import hybrid_config_from_args

from megatron_qad.checkpoint.hf_reader import PASSTHROUGH_FILE
from megatron_qad.config.job_config import JobConfig, ModelConfig
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.config.yaml_file import to_flags
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.megatron_args import make_parser, megatrons_refusals
from megatron_qad.models.builder import QADModelConfig, build_chunks, freeze
from megatron_qad.models.specs import hybrid_stack_spec
from megatron_qad.models.weight_loading import load_weights
from megatron_qad.training.batch import ForwardPass
from megatron_qad.training.image_features import ImageEncoder
from megatron_qad.training.offloaded_teacher import OffloadedTeacher
from megatron_qad.training.teacher import Teacher


def model_config(config: JobConfig, args: argparse.Namespace, model: ModelConfig) -> QADModelConfig:
    """Return the config from which Megatron's builder builds a model.

    Args:
        args: Megatron's arguments with the shape of this model (``replace_model_shape``).

    Raises:
        QADError: Megatron refuses the flags.
    """
    with megatrons_refusals("__post_init__", "hybrid_config_from_args"):
        builder_config = hybrid_config_from_args(args, model_config_cls=QADModelConfig)
    builder_config.hybrid_stack_spec = hybrid_stack_spec(
        config.layer_spec,
        qk_layernorm=builder_config.transformer.qk_layernorm,
        trains_router=config.options.qad_train_router,
        mlp_widths=model.family.mlp_widths(model.hf),
    )
    builder_config.rope_scaling = model.family.rope_scaling(model.hf)
    return builder_config


def replace_model_shape(config: JobConfig, args: argparse.Namespace, model: ModelConfig) -> argparse.Namespace:
    """Return a copy of Megatron's ``args`` in which the shape of ``model`` replaces that of the student."""
    virtual = config.teacher_virtual_stages
    shape = model.shape(config.flags, virtual)
    parser = make_parser(QADOptions)
    parsed = parser.parse_args(to_flags(shape))
    replaced = copy.copy(args)
    # Options that only the student has (experts, Mamba) are reset to Megatron's defaults.
    for name in shape | config.student.family.megatron_args(config.student.hf):
        dest = parser._option_string_actions[f"--{name}"].dest
        value = getattr(parsed, dest)
        setattr(replaced, dest, value[0] if isinstance(value, list) and len(value) == 1 else value)  # as Megatron does
    replaced.num_layers = model.num_layers
    replaced.virtual_pipeline_model_parallel_size = virtual if virtual > 1 else None
    replaced.overlap_p2p_comm = args.overlap_p2p_comm and virtual > 1
    return replaced


def build_teacher(config: JobConfig, args: argparse.Namespace, forward: ForwardPass) -> Teacher:
    """Build the frozen teacher in BF16 (or the job's precision), with the job's parallelism and its own stages."""
    chunks = build_chunks(model_config(config, replace_model_shape(config, args, config.teacher), config.teacher))
    load_weights(chunks, config.teacher.checkpoint)
    print_rank_0(f"megatron_qad: teacher from {config.teacher.checkpoint}, frozen")
    teacher_class = OffloadedTeacher if config.options.qad_teacher_cpu_offload else Teacher
    return teacher_class(
        [freeze(chunk) for chunk in chunks],
        forward,
        config.teacher_microbatches_per_pass,
        config.output_mode.teacher_hidden,
    )


def build_image_encoder(config: JobConfig) -> ImageEncoder:
    """Return the vision encoder of a job whose data has images; both models use it.

    Raises:
        QADError: the teacher has another encoder, or none.
    """
    files = [Path(model.checkpoint) / "hf" / PASSTHROUGH_FILE for model in (config.student, config.teacher) if model]
    settings = config.student.family.vision(config.student.hf)
    if config.teacher is not None:
        teacher = config.teacher.family.vision
        if teacher is None or teacher(config.teacher.hf) != settings:
            raise QADError(
                f"--qad-teacher {config.teacher.checkpoint}: its vision encoder differs from that of the student. The "
                "data has images, and one encoder serves both models: give a teacher with the same encoder."
            )
    dtype = torch.bfloat16 if config.flags.bf16 else torch.float32
    return ImageEncoder(settings, files, dtype, config.options.qad_vision_align_corners)


def check_disjoint(teacher: list[torch.nn.Module], student: list[torch.nn.Module]) -> None:
    """Check that teacher and student share no parameter; DDP, optimizer and checkpoint take those of the student."""
    ids = [{id(p) for chunk in chunks for p in chunk.parameters()} for chunks in (teacher, student)]
    shared = set.intersection(*ids)
    assert not shared, f"the teacher shares {len(shared)} parameters with the student"
