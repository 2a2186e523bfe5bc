"""Builds the models of a job: the config of the student that Megatron builds, and the frozen teacher beside it."""

import argparse
import copy

import torch
from megatron.training import print_rank_0
from megatron.training.argument_utils import hybrid_config_from_args

from megatron_qad.config.job_config import JobConfig, ModelConfig
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.config.yaml_file import to_flags
from megatron_qad.engine.megatron_args import make_parser
from megatron_qad.models.builder import QADModelConfig, build_chunks, freeze
from megatron_qad.models.specs import hybrid_stack_spec
from megatron_qad.models.weight_loading import load_weights
from megatron_qad.training.batch import ForwardPass
from megatron_qad.training.offloaded_teacher import OffloadedTeacher
from megatron_qad.training.teacher import Teacher


def model_config(config: JobConfig, args: argparse.Namespace, model: ModelConfig) -> QADModelConfig:
    """What Megatron's builder makes a model of.

    Args:
        args: Megatron's, with the shape of this model (``with_shape_of``).
    """
    found = hybrid_config_from_args(args, model_config_cls=QADModelConfig)
    found.hybrid_stack_spec = hybrid_stack_spec(
        config.layer_spec,
        qk_layernorm=found.transformer.qk_layernorm,
        trains_router=config.options.qad_train_router,
        mlp_widths=model.family.mlp_widths(model.hf),
    )
    found.rope_scaling = model.family.rope_scaling(model.hf)
    return found


def with_shape_of(config: JobConfig, args: argparse.Namespace, model: ModelConfig) -> argparse.Namespace:
    """A copy of Megatron's ``args``, which have the student's shape, with that of another model in its place."""
    virtual = config.teacher_virtual_stages
    shape = model.shape(config.flags, virtual)
    parser = make_parser(QADOptions)
    parsed = parser.parse_args(to_flags(shape))
    other = copy.copy(args)
    # What only the student has (experts, a Mamba state) goes back to Megatron's default.
    for name in shape | config.student.family.megatron_args(config.student.hf):
        dest = parser._option_string_actions[f"--{name}"].dest
        value = getattr(parsed, dest)
        setattr(other, dest, value[0] if isinstance(value, list) and len(value) == 1 else value)  # as Megatron does
    other.num_layers = model.num_layers
    other.virtual_pipeline_model_parallel_size = virtual if virtual > 1 else None
    other.overlap_p2p_comm = args.overlap_p2p_comm and virtual > 1
    return other


def build_teacher(config: JobConfig, args: argparse.Namespace, forward: ForwardPass) -> Teacher:
    """The frozen teacher in BF16 (or the job's precision), in this job's parallel layout, with stages of its own."""
    chunks = build_chunks(model_config(config, with_shape_of(config, args, config.teacher), config.teacher))
    load_weights(chunks, config.teacher.checkpoint)
    print_rank_0(f"megatron_qad: teacher from {config.teacher.checkpoint}, frozen")
    kind = OffloadedTeacher if config.options.qad_teacher_cpu_offload else Teacher
    return kind(
        [freeze(chunk) for chunk in chunks],
        forward,
        config.teacher_microbatches_per_pass,
        config.output_mode.teacher_hidden,
    )


def check_apart(teacher: list[torch.nn.Module], student: list[torch.nn.Module]) -> None:
    """No parameter of the teacher is one of what DDP, the optimizer and the checkpoint will take theirs from."""
    ids = [{id(p) for chunk in chunks for p in chunk.parameters()} for chunks in (teacher, student)]
    shared = set.intersection(*ids)
    assert not shared, f"{len(shared)} parameters of the teacher are the student's, too"
