"""Rejects flags that QAD does not support or that contradict each other. The checks have no side effects.

Other modules check the parallelism (``parallelism``), the output flags (``output_mode``), numbers (``number_checks``),
the learning rate and the training length (``schedule_checks``), the data (``data_flags``), saving (``saving_checks``)
and the model's shape (``shape_flags``).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.parallelism import is_row_parallel, ranks_of_layers, split_into_stages, teacher_virtual_stages
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.distillation import WeightedLosses
from megatron_qad.distillation.hidden_states import HiddenLoss
from megatron_qad.distillation.scale_growth import ScaleGrowth
from megatron_qad.engine.errors import QADError
from megatron_qad.formats.format import check_columns
from megatron_qad.formats.format_registry import FORMATS, UNQUANTIZED
from megatron_qad.models.families.base import ParamMapping
from megatron_qad.quantization.scale_settings import ScaleSetting


def check_option_values(options: QADOptions) -> None:
    """Check that values of ``--qad-*`` flags do not contradict each other; ``number_checks`` checks the numbers."""
    if options.qad_calibration_percentile is not None and options.qad_calibration_headroom is not None:
        raise QADError(
            "--qad-calibration-percentile and --qad-calibration-headroom both set the amax of inputs. Choose one."
        )


def check_models(options: QADOptions, losses: WeightedLosses) -> None:
    """Check that the job has a student, and a teacher if the loss needs one."""
    if options.qad_teacher is None and losses.needs_teacher:
        raise QADError(
            f"--qad-loss {options.qad_loss} needs --qad-teacher. Pass a checkpoint written by megatron-qad import."
        )
    if options.qad_student is None and options.qad_teacher is None:
        raise QADError("the student has no initial checkpoint. Pass --qad-student or --qad-teacher.")


def check_blocks(flags: MegatronFlags, linears: Sequence[ParamMapping], formats: Mapping[str, str]) -> None:
    """Check that tensor parallelism leaves each rank complete blocks of every quantized weight.

    Args:
        linears: weights of the student.
        formats: format of each linear, by Megatron weight name.

    Raises:
        QADError: a shard's number of columns is not a multiple of its format's block size.
    """
    tp = flags.tensor_model_parallel_size
    for linear in linears:
        fmt = FORMATS[formats.get(linear.megatron, UNQUANTIZED.name)]
        ranks = (flags.expert_tensor_parallel_size or tp) if linear.kind == "expert" else tp
        check_columns(linear.megatron, linear.shape[1] // (ranks if is_row_parallel(linear) else 1), fmt)


def check_headroom(options: QADOptions, formats: Mapping[str, str]) -> None:
    """Check that a job whose inputs get headroom has inputs with block scales.

    Args:
        formats: format of each quantized linear, by Megatron weight name.
    """
    inputs = [FORMATS[name].input for name in formats.values()]
    if options.qad_calibration_headroom is not None and not any(fmt and fmt.block_size > 1 for fmt in inputs):
        raise QADError(
            f"--qad-calibration-headroom {options.qad_calibration_headroom:g}: the policy {options.qad_policy} gives no"
            " linear NVFP4 inputs, and only these have block scales. Leave the flag out."
        )


def check_growth(losses: WeightedLosses, scales: Mapping[str, ScaleSetting]) -> None:
    """Check that a penalty on growing scales knows all scales when the job starts."""
    terms = losses.terms_of_type(ScaleGrowth)
    waiting = [name for name, setting in scales.items() if setting.needs_moments]
    if terms and waiting:
        raise QADError(
            f"--qad-loss: {terms[0].name} compares scales with those at the start, but {waiting[0]} has the scale rule "
            "local_hessian, whose scales are chosen in the calibration and then frozen. Leave one of them out."
        )


def check_tokenizer(flags: MegatronFlags) -> None:
    """Reject a tokenizer that would run its own code or be downloaded (docs/security.md)."""
    if flags.trust_remote_code:
        raise QADError(
            "--trust-remote-code would run code that came with a tokenizer, which a job never does. Leave the flag "
            "out: the data is already tokenized."
        )
    if flags.tokenizer_type in (None, "NullTokenizer"):
        return
    local_types = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    if flags.tokenizer_type not in local_types:
        raise QADError(
            f"--tokenizer-type {flags.tokenizer_type}: expected NullTokenizer (the default) or, with a local "
            f"--tokenizer-model, one of {', '.join(local_types)}."
        )
    if flags.tokenizer_model is None or not Path(flags.tokenizer_model).exists():
        raise QADError(
            f"--tokenizer-model {flags.tokenizer_model}: does not exist. Expected a local directory or file; models on "
            "the hub are not downloaded."
        )


def check_router(flags: MegatronFlags, options: QADOptions) -> None:
    """Reject load-balancing losses with frozen routers: their gradients would train the layers before the router."""
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        value = getattr(flags, name)
        if any(value if isinstance(value, list) else [value]) and not options.qad_train_router:
            raise QADError(
                f"--{name.replace('_', '-')} {value} with a frozen router would train the layers before the router for "
                "load balance instead of the teacher's distribution. Set it to 0 or use --qad-train-router."
            )


def check_masters(flags: MegatronFlags) -> None:
    """Reject optimizers without a separate master copy of a parameter: in-place quantization would overwrite it."""
    rejected = {
        "fp16": "skips steps whose gradients overflow, and QAD does not support its loss scale",
        "use_precision_aware_optimizer": "stores the upper half of the master in the parameter",
        "use_megatron_fsdp": "shards the parameters, so that no rank has a complete weight to quantize",
        "use_torch_fsdp2": "shards the parameters, so that no rank has a complete weight to quantize",
        "fp8_param_gather": "stores the parameters in FP8",
        "fp4_param_gather": "stores the parameters in FP4",
    }
    for name, reason in rejected.items():
        if getattr(flags, name):
            raise QADError(
                f"--{name.replace('_', '-')} {reason}; QAD quantizes BF16 parameters in place and needs separate "
                "float32 masters in the optimizer. Use --bf16 --use-distributed-optimizer."
            )


def check_step(flags: MegatronFlags) -> None:
    """Reject schedules, weight sharding and checkpoint formats that QAD's step and exporter do not support."""
    tp, expert_tp = flags.tensor_model_parallel_size, flags.expert_tensor_parallel_size
    shards = (
        (tp, flags.tensor_parallel_num_weight_shards),
        (expert_tp or tp, flags.expert_tensor_parallel_num_weight_shards),
    )
    rejected = {
        f"--ckpt-format {flags.ckpt_format}": (
            flags.ckpt_format != "torch_dist",
            "QAD can only verify, resume and export torch_dist checkpoints",
        ),
        f"--fp8-format {flags.fp8}": (
            flags.fp8,
            "it would also apply to the teacher and change its outputs",
        ),
        f"--fp4-format {flags.fp4}": (
            flags.fp4,
            "it would also apply to the teacher and change its outputs",
        ),
        f"--cuda-graph-impl {flags.cuda_graph_impl}": (
            flags.cuda_graph_impl != "none",
            "calibration and the teacher's pass run outside of the schedule that a graph would capture",
        ),
        "--overlap-moe-expert-parallel-comm": (
            flags.overlap_moe_expert_parallel_comm,
            "its schedule needs a layer plan from the forward step, which QAD's step does not build",
        ),
        "--tensor-parallel-num-weight-shards": (
            any(num_shards is not None and num_shards > size for size, num_shards in shards),
            "no rank has a complete row of a weight, and each shard would get an amax of its own",
        ),
        "--hybrid-context-parallel": (
            flags.hybrid_context_parallel,
            "its data has a different shape than QAD's batches",
        ),
    }
    for flag, (is_set, reason) in rejected.items():
        if is_set:
            raise QADError(f"{flag} is not supported: {reason}. Leave it out.")


def check_skipped(flags: MegatronFlags, options: QADOptions) -> None:
    """Reject skipping a step whose data calibration has read ahead: Megatron would skip later data instead."""
    skipped = set(flags.iterations_to_skip or ())
    packed_shards = flags.dataloader_inter_document_masking and flags.tensor_model_parallel_size > 1
    if skipped and (flags.pipeline_model_parallel_size > 2 or flags.num_virtual_stages > 1 or packed_shards):
        raise QADError(
            "--iterations-to-skip: Megatron does not read the data of a skipped step with this parallelism (more than "
            "two pipeline stages, virtual stages, or tensor parallelism with packed documents). Leave it out."
        )
    if not skipped or flags.load is not None:
        return
    calibrates_at = next(step for step in range(1, len(skipped) + 2) if step not in skipped)
    last = calibrates_at + math.ceil(options.qad_calibration_samples / flags.global_batch_size)
    read_ahead = sorted(step for step in skipped if calibrates_at < step <= last)
    if read_ahead:
        raise QADError(
            f"--iterations-to-skip {read_ahead[0]}: the data of steps up to {last} is read ahead for calibration. Skip "
            "later steps, or calibrate on fewer samples (--qad-calibration-samples)."
        )


def check_ptq(flags: MegatronFlags) -> None:
    """Reject flags that ask a PTQ job to resume or to skip what it does not do."""
    if flags.load is not None:
        raise QADError(
            f"--load {flags.load}: --qad-ptq does not resume. Pass the checkpoint to be quantized with --qad-student."
        )
    if flags.skip_train:
        raise QADError(
            "--skip-train: --qad-ptq trains nothing, it calibrates, saves and validates. Leave out one of the flags."
        )


def check_sequential_ptq(flags: MegatronFlags, options: QADOptions) -> None:
    """Reject ``--qad-ptq-sequential`` without ``--qad-ptq``, or with parallelism other than over data."""
    if not options.qad_ptq_sequential:
        return
    if not options.qad_ptq:
        raise QADError("--qad-ptq-sequential holds one layer at a time, which training cannot. Add --qad-ptq.")
    for name in ("tensor", "pipeline", "expert"):
        size = getattr(flags, f"{name}_model_parallel_size")
        if size > 1:
            raise QADError(
                f"--{name}-model-parallel-size {size}: --qad-ptq-sequential holds one layer on each rank and divides "
                "only the data. Leave out one of the flags."
            )
    if flags.context_parallel_size > 1:
        raise QADError(
            f"--context-parallel-size {flags.context_parallel_size}: --qad-ptq-sequential divides sequences, not the "
            "tokens of one. Leave out one of the flags."
        )


def check_hidden_losses(
    flags: MegatronFlags, options: QADOptions, losses: WeightedLosses, shapes: Mapping[str, Mapping]
) -> None:
    """Check that hidden-state losses compare existing layers of equal width on the same pipeline rank.

    Args:
        shapes: see ``parallelism.check_parallelism``.
    """
    terms = losses.terms_of_type(HiddenLoss)
    if not terms:
        return
    student, teacher = shapes["the student"], shapes["the teacher"]
    widths = [shape["hidden-size"] for shape in (student, teacher)]
    if widths[0] != widths[1]:
        raise QADError(
            f"--qad-loss: {terms[0].name} compares hidden states of {widths[0]} elements (student) and {widths[1]} "
            "(teacher), which must be equal. Choose a teacher with the student's hidden size."
        )
    patterns = [shape["hybrid-layer-pattern"] for shape in (student, teacher)]
    pp = flags.pipeline_model_parallel_size
    virtual = (flags.num_virtual_stages, teacher_virtual_stages(len(patterns[1]), flags, options))
    stages = [split_into_stages(pattern, pp * v) for pattern, v in zip(patterns, virtual, strict=True)]
    student_ranks, teacher_ranks = (ranks_of_layers(pattern, pp) for pattern in stages)
    for term in terms:
        try:
            pairs = term.loss.pairs(*map(len, patterns))
        except ValueError as error:
            raise QADError(f"--qad-loss: {term.name}: {error}") from error
        for layer, teacher_layer in pairs:
            rank, teacher_rank = student_ranks[layer], teacher_ranks[teacher_layer]
            if rank != teacher_rank:
                raise QADError(
                    f"--qad-loss: {term.name} compares layer {layer} of the student, on pipeline rank {rank}, with "
                    f"layer {teacher_layer} of the teacher, on rank {teacher_rank}. Choose layers on the same rank "
                    "(teacher_layers=[...]) or fewer pipeline stages."
                )
