"""Command line -> Megatron's args, with the model's shape taken from the Hugging Face config inside the checkpoint.

The parts are laid one after the other, and the last one wins: what this machine needs, the model's shape, ``--config``
files, the user's flags. So every Megatron flag works unchanged.
"""

import argparse
import copy
import dataclasses
import importlib.util
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.training.argument_utils import ArgumentGroupFactory, hybrid_config_from_args
from megatron.training.arguments import add_megatron_arguments, parse_and_validate_args

from megatron_qad.config.options import QADOptions
from megatron_qad.config.yaml_file import expand, to_flags
from megatron_qad.distillation import LogitLoss, parse_loss
from megatron_qad.engine import Capabilities, QADError, capabilities
from megatron_qad.engine.megatron_wheel import (
    dispatch_tokens_on_cpu,
    load_reshardable_state_of_torch_adam,
    pack_mamba_rows_without_te,
    save_checkpoints_in_this_process,
    use_compiled_dataset_helpers,
)
from megatron_qad.engine.run_directory import whole_saves
from megatron_qad.formats.block_scales import SCALE_RULES
from megatron_qad.models.builder import QADModelConfig
from megatron_qad.models.context_parallel import partitioned_indices
from megatron_qad.models.families import family_of, text_config
from megatron_qad.models.run_directory import read_config
from megatron_qad.models.specs import hybrid_stack_spec
from megatron_qad.training import checkpoints, loggers, preemption, resume
from megatron_qad.training.hidden_states import check_hidden_losses
from megatron_qad.training.layout import (
    check_layout,
    num_virtual_stages,
    teacher_virtual_stages,
    with_stages,
    without,
    without_virtual_stages,
)
from megatron_qad.training.outputs import settle_outputs
from megatron_qad.training.vocabulary import check_same_vocabulary

_IN_SAMPLES = ("--train-samples", "--lr-decay-samples", "--lr-warmup-samples")
"""How long a job trains, counted in samples: Megatron refuses them beside --train-iters."""

_OF_TRAINING = (
    *(*_IN_SAMPLES, "--save", "--load", "--tensorboard-dir"),
    *("--wandb-project", "--qad-keep-last", "--qad-keep-best", "--qad-spike-factor"),
)
"""What a job that trains nothing has no use for, or would count, save or log as training."""


def add_qad_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    ArgumentGroupFactory(QADOptions).build_group(parser, title="quantization-aware distillation")
    for action in parser._actions:  # argparse formats help with %: "10%)" of a flag of megatron-core 0.19.2 ends --help
        if action.help is not argparse.SUPPRESS and action.help:
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
    return parser


def parse_arguments(argv: Sequence[str] | None = None, *, trains: bool = True) -> argparse.Namespace:
    """Parse and validate; sets Megatron's global args.

    Adds ``args.qad`` (the ``QADOptions``), ``args.hf_config`` and ``args.teacher_hf_config`` (parsed ``config.json``),
    and ``args.eval_iters_given``: whether ``--eval-iters`` was.

    Args:
        trains: False leaves out what concerns training alone, so that a tool may be given a job's flags.

    Raises:
        QADError: for what QAD itself checks; Megatron's own checks raise as they do upstream.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = add_qad_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    argv = expand(argv, parser)
    if not trains:
        argv = [*without(argv, *_OF_TRAINING), "--train-iters", "1"]  # Megatron wants to know for how long
    parser.set_defaults(eval_iters=None)
    early, _ = parser.parse_known_args(argv)
    options = _qad_options(early)
    check_tokenizer(early)
    loss = parse_loss(options.qad_loss, temperature=options.qad_temperature)
    if options.qad_weight_scale_rule not in SCALE_RULES:
        raise QADError(
            f"--qad-weight-scale-rule {options.qad_weight_scale_rule!r}: expected one of {', '.join(SCALE_RULES)}"
        )
    percentile = options.qad_calibration_percentile
    if percentile is not None and not 0 < percentile <= 100:
        raise QADError(f"--qad-calibration-percentile {percentile}: expected a number above 0, up to 100")
    if options.qad_teacher is None and loss.needs_teacher:
        raise QADError(f"--qad-loss {options.qad_loss} needs --qad-teacher, a checkpoint made by tools/import_hf.py")
    student = options.qad_student or options.qad_teacher
    if student is None:
        raise QADError("--qad-student or --qad-teacher must name the student's initial checkpoint")
    hf_config = read_config(student)
    teacher_config = read_config(options.qad_teacher) if options.qad_teacher else None
    if teacher_config is not None:
        check_same_vocabulary(student, text_config(hf_config), options.qad_teacher, text_config(teacher_config))
    models = {"the student": hf_config} | ({"the teacher": teacher_config} if teacher_config is not None else {})
    shapes = {
        who: family_of(config).megatron_args(config) | {"mlp-widths": family_of(config).mlp_widths(config)}
        for who, config in models.items()
    }
    if early.save is not None:
        checkpoints.refuse_models_directory(
            early.save, {"--qad-teacher": options.qad_teacher, "--qad-student": student}
        )
    if options.qad_ptq:
        checkpoints.refuse_training_run(early.save)
        argv = without(argv, *_IN_SAMPLES)
        argv += to_flags({"train-iters": 1, "lr": 0.0, "min-lr": 0.0, "lr-warmup-iters": 0, "no-save-optim": True})
    if options.qad_dry_run and "WORLD_SIZE" not in os.environ:
        # A plan can be made anywhere: as if on one model-parallel group.
        of_experts = early.expert_tensor_parallel_size or early.tensor_model_parallel_size
        ranks = early.pipeline_model_parallel_size * math.lcm(
            early.tensor_model_parallel_size * early.context_parallel_size,
            of_experts * early.expert_model_parallel_size,
        )
        os.environ["WORLD_SIZE"] = str(ranks)
    check_router(early, options)
    check_layout(early, shapes)
    shape = shape_in_layout(hf_config, early, num_virtual_stages(early))
    argv = without_virtual_stages(argv) + resume.load_flags(early)
    sys.argv = [sys.argv[0], *to_flags({**machine_options(capabilities(), options.qad_layer_spec), **shape}), *argv]
    # Parsing also makes Megatron's signal handler and starts wandb and TensorBoard, which write.
    if early.save is not None and not options.qad_dry_run:
        checkpoints.own(early.save)
    preemption.install(options.qad_job_dir or os.environ.get("QAD_JOB_DIR"))
    resume.continue_wandb_run(early)
    loggers.install(early)
    use_compiled_dataset_helpers()
    load_reshardable_state_of_torch_adam()
    if capabilities().device == "cpu":
        dispatch_tokens_on_cpu()
    if capabilities().layer_spec == "local":
        pack_mamba_rows_without_te(partitioned_indices)
    args = parse_and_validate_args(extra_args_provider=add_qad_arguments)
    check_masters(args)
    check_step(args)
    if not args.async_save:
        save_checkpoints_in_this_process()
    whole_saves.install()
    args.qad = _qad_options(args)
    args.eval_iters_given = early.eval_iters is not None
    if args.dataloader_inter_document_masking and args.qad.qad_document_multiple is None:
        cp = args.context_parallel_size
        args.qad.qad_document_multiple = 2 * cp if cp > 1 else 1
    args.hf_config = hf_config
    args.teacher_hf_config = teacher_config
    for term in loss.of_kind(LogitLoss):
        term.loss.check(args.padded_vocab_size // args.tensor_model_parallel_size)
    check_hidden_losses(args, loss, shapes)
    settle_outputs(args, loss, shapes["the teacher"]["hidden-size"] if teacher_config else None)
    checkpoints.check_options(args)
    check_skipped(args)
    return args


def check_tokenizer(args: argparse.Namespace) -> None:
    """Refuse a tokenizer that would bring code or be downloaded (docs/security.md)."""
    if args.trust_remote_code:
        raise QADError(
            "--trust-remote-code would run code that came with a tokenizer, and a job runs none. Leave it out: the "
            "data is tokenized already"
        )
    if args.tokenizer_type in (None, "NullTokenizer"):
        return
    by_path = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    if args.tokenizer_type not in by_path:
        raise QADError(
            f"--tokenizer-type {args.tokenizer_type}: expected NullTokenizer, the default, or {', '.join(by_path)}, "
            "which are read from a local --tokenizer-model"
        )
    if args.tokenizer_model is None or not Path(args.tokenizer_model).exists():
        raise QADError(
            f"--tokenizer-model {args.tokenizer_model}: does not exist. Expected a local directory or file; names on "
            "the hub are not downloaded"
        )


def check_router(args: argparse.Namespace, options: QADOptions) -> None:
    """Refuse losses that balance the load of experts whose router is frozen: they would move what feeds it instead."""
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        value = getattr(args, name)
        if any(value if isinstance(value, list) else [value]) and not options.qad_train_router:
            raise QADError(
                f"--{name.replace('_', '-')} {value} with a frozen router would change the layers before it, to other "
                "ends than the teacher's distribution. Leave it out, or let the router learn (--qad-train-router)"
            )


def check_masters(args: argparse.Namespace) -> None:
    """Refuse optimizers that keep no master apart from the parameter, which in-place quantization would overwrite."""
    refused = {
        "fp16": "leaves out steps whose gradients overflow, and its loss scale is not ours",
        "use_precision_aware_optimizer": "keeps in the parameter the upper half of its master",
        "use_megatron_fsdp": "shards the parameters, so that no rank has a weight to quantize",
        "use_torch_fsdp2": "shards the parameters, so that no rank has a weight to quantize",
        "fp8_param_gather": "keeps the parameters in FP8",
        "fp4_param_gather": "keeps the parameters in FP4",
    }
    for name, why in refused.items():
        if getattr(args, name, False):
            raise QADError(
                f"--{name.replace('_', '-')} {why}; QAD quantizes BF16 parameters in place and needs the optimizer's "
                "float32 masters beside them. Use --bf16 --use-distributed-optimizer"
            )


def check_step(args: argparse.Namespace) -> None:
    """Refuse what runs a step, shares weights out, or saves in a way that QAD's step and exporter do not know."""
    refused = {
        f"--ckpt-format {args.ckpt_format}": (
            args.ckpt_format != "torch_dist",
            "checkpoints of other formats can be neither checked, resumed nor exported here",
        ),
        f"--fp8-format {args.fp8}": (
            args.fp8,
            "the teacher would compute in it, too, and not be itself",
        ),
        f"--fp4-format {args.fp4}": (
            args.fp4,
            "the teacher would compute in it, too, and not be itself",
        ),
        f"--cuda-graph-impl {args.cuda_graph_impl}": (
            args.cuda_graph_impl != "none",
            "calibration and the teacher's pass come before the schedule that a graph would hold",
        ),
        "--overlap-moe-expert-parallel-comm": (
            args.overlap_moe_expert_parallel_comm,
            "its schedule asks the forward step for a plan of the layers, which the step of QAD does not make",
        ),
        "--tensor-parallel-num-weight-shards": (
            max(args.gtp_weight_remat_size, args.expert_gtp_weight_remat_size) > 1,
            "no rank has a whole row of a weight, and the shards' amaxes would be found apart",
        ),
        "--hybrid-context-parallel": (args.hybrid_context_parallel, "its data has another shape than QAD's batches"),
    }
    for flag, (is_set, why) in refused.items():
        if is_set:
            raise QADError(f"{flag} is not supported: {why}. Leave it out")


def check_skipped(args: argparse.Namespace) -> None:
    """Refuse to leave out a step whose data calibration has read ahead: Megatron would leave out what comes next."""
    skipped = set(args.iterations_to_skip or ())
    stages, virtual = args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    packed_shards = args.dataloader_inter_document_masking and args.tensor_model_parallel_size > 1
    if skipped and (stages > 2 or virtual or packed_shards):
        raise QADError(
            "--iterations-to-skip: Megatron does not read the data of a skipped step in this layout (more than two "
            "pipeline stages, virtual stages, or tensor parallelism with documents kept apart). Leave it out"
        )
    calibrates_at = next(step for step in range(1, len(skipped) + 2) if step not in skipped)
    last = calibrates_at + math.ceil(args.qad.qad_calibration_samples / args.global_batch_size)
    read_ahead = sorted(step for step in skipped if calibrates_at < step <= last)
    if read_ahead and args.load is None:
        raise QADError(
            f"--iterations-to-skip {read_ahead[0]}: the data of steps up to {last} is read ahead for calibration. Skip "
            "later steps, or calibrate on fewer samples (--qad-calibration-samples)"
        )


def shape_in_layout(hf_config: dict, args: argparse.Namespace, virtual_stages: int) -> dict:
    """A model's shape as Megatron options, cut into the pipeline stages of ``args``."""
    shape = family_of(hf_config).megatron_args(hf_config)
    num_stages = args.pipeline_model_parallel_size * virtual_stages
    shape["hybrid-layer-pattern"] = with_stages(shape["hybrid-layer-pattern"], num_stages)
    return shape


def with_shape_of(args: argparse.Namespace, hf_config: dict) -> argparse.Namespace:
    """``args`` with the model's shape replaced by that of another config: how a teacher of another shape is built."""
    num_layers = len(family_of(hf_config).layer_pattern(hf_config))
    virtual = teacher_virtual_stages(num_layers, args)
    shape = shape_in_layout(hf_config, args, virtual)
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    parsed = parser.parse_args(to_flags(shape))
    other = copy.copy(args)
    # What only the student has (experts, a Mamba state) goes back to Megatron's default.
    for name in shape | family_of(args.hf_config).megatron_args(args.hf_config):
        dest = parser._option_string_actions[f"--{name}"].dest
        value = getattr(parsed, dest)
        setattr(other, dest, value[0] if isinstance(value, list) and len(value) == 1 else value)  # as Megatron does
    other.num_layers = num_layers
    other.virtual_pipeline_model_parallel_size = virtual if virtual > 1 else None
    other.overlap_p2p_comm = args.overlap_p2p_comm and virtual > 1
    return other


def machine_options(machine: Capabilities, layer_spec: str | None = None) -> dict:
    """Megatron options that follow from the machine and from the method, not from the model."""
    options = {
        "calculate-per-token-loss": True,  # losses are sums; the division by the global token count happens once
        "attention-dropout": 0.0,  # Megatron's default of 0.1 would be most of the KL between equal models
        "hidden-dropout": 0.0,
        "no-create-attention-mask-in-dataloader": True,  # attention is causal by the layer spec
        "ckpt-format": "torch_dist",
        "exit-signal-handler": True,  # SIGTERM saves after the current step (training/preemption.py)
        "no-check-for-nan-in-loss-and-grad": True,  # training/guard.py does, in one pass, and can do more than stop
        # Megatron's default, nvrx, is a package of its own.
        "async-strategy": "nvrx" if importlib.util.find_spec("nvidia_resiliency_ext") else "mcore",
        "save-interval": 1000,  # Megatron has no default and stops at --save without one
        "eval-interval": 1000,  # the same, with a TypeError
        "tokenizer-type": "NullTokenizer",  # the data is tokenized already; its metadata names the tokenizer
    }
    if (layer_spec or machine.layer_spec) == "local":
        # Fused kernels that come with Transformer Engine or apex.
        options |= {
            "transformer-impl": "local",
            "no-persist-layer-norm": True,
            "no-rope-fusion": True,
            "no-masked-softmax-fusion": True,
        }
    if not machine.fuses_gradient_accumulation:
        options["no-gradient-accumulation-fusion"] = True  # Megatron's default; it stops where the extension is missing
    if machine.backend == "gloo":
        options["distributed-backend"] = "gloo"
    return options


def model_config(args: argparse.Namespace, hf_config: dict) -> QADModelConfig:
    """The ``HybridModelConfig`` of a model in this job's parallel layout."""
    config = hybrid_config_from_args(args, model_config_cls=QADModelConfig)
    layer_spec = args.qad.qad_layer_spec or capabilities().layer_spec
    family = family_of(hf_config)
    config.hybrid_stack_spec = hybrid_stack_spec(
        layer_spec,
        qk_layernorm=config.transformer.qk_layernorm,
        trains_router=args.qad.qad_train_router,
        mlp_widths=family.mlp_widths(hf_config),
    )
    config.rope_scaling = family.rope_scaling(hf_config)
    return config


def _qad_options(args: argparse.Namespace) -> QADOptions:
    return QADOptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(QADOptions)})
