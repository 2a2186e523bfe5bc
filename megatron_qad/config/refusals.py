"""Refuses flags that QAD cannot honour. Everything here looks at a configuration and changes nothing.

Parallel layouts are refused in ``parallelism``, outputs that contradict each other in ``output_mode``.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.parallelism import ranks_of_layers, teacher_virtual_stages, with_stages
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.distillation import WeightedLosses
from megatron_qad.distillation.hidden_states import HiddenLoss
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.iterations import iteration_of, saved_iterations
from megatron_qad.formats.block_scales import SCALE_RULES

_SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank"),
    *("seq_length", "micro_batch_size", "global_batch_size", "make_vocab_size_divisible_by"),
    *("qad_teacher_micro_batch_size", "qad_calibration_samples", "qad_pad_documents_to"),
)


def check_option_values(options: QADOptions) -> None:
    """Refuse values of ``--qad-*`` flags that mean nothing."""
    if options.qad_weight_scale_rule not in SCALE_RULES:
        raise QADError(
            f"--qad-weight-scale-rule {options.qad_weight_scale_rule!r}: expected one of {', '.join(SCALE_RULES)}"
        )
    percentile = options.qad_calibration_percentile
    if percentile is not None and not 0 < percentile <= 100:
        raise QADError(f"--qad-calibration-percentile {percentile}: expected a number above 0, up to 100")


def check_sizes(flags: MegatronFlags, options: QADOptions) -> None:
    """Refuse sizes below 1, by which everything else is divided."""
    for name in _SIZES:
        size = getattr(flags, name, None) if hasattr(flags, name) else getattr(options, name)
        if size is not None and size < 1:
            raise QADError(f"--{name.replace('_', '-')} {size}: expected a number of 1 or more")


def check_models(options: QADOptions, losses: WeightedLosses) -> None:
    """Refuse a job that names no model, or a loss whose teacher is missing."""
    if options.qad_teacher is None and losses.needs_teacher:
        raise QADError(f"--qad-loss {options.qad_loss} needs --qad-teacher, a checkpoint made by tools/import_hf.py")
    if options.qad_student is None and options.qad_teacher is None:
        raise QADError("--qad-student or --qad-teacher must name the student's initial checkpoint")


def check_tokenizer(flags: MegatronFlags) -> None:
    """Refuse a tokenizer that would bring code or be downloaded (docs/security.md)."""
    if flags.trust_remote_code:
        raise QADError(
            "--trust-remote-code would run code that came with a tokenizer, and a job runs none. Leave it out: the "
            "data is tokenized already"
        )
    if flags.tokenizer_type in (None, "NullTokenizer"):
        return
    by_path = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    if flags.tokenizer_type not in by_path:
        raise QADError(
            f"--tokenizer-type {flags.tokenizer_type}: expected NullTokenizer, the default, or {', '.join(by_path)}, "
            "which are read from a local --tokenizer-model"
        )
    if flags.tokenizer_model is None or not Path(flags.tokenizer_model).exists():
        raise QADError(
            f"--tokenizer-model {flags.tokenizer_model}: does not exist. Expected a local directory or file; names on "
            "the hub are not downloaded"
        )


def check_router(flags: MegatronFlags, options: QADOptions) -> None:
    """Refuse losses that balance the load of experts whose router is frozen: they would move what feeds it instead."""
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        value = getattr(flags, name)
        if any(value if isinstance(value, list) else [value]) and not options.qad_train_router:
            raise QADError(
                f"--{name.replace('_', '-')} {value} with a frozen router would change the layers before it, to other "
                "ends than the teacher's distribution. Leave it out, or let the router learn (--qad-train-router)"
            )


def check_masters(flags: MegatronFlags) -> None:
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
        if getattr(flags, name):
            raise QADError(
                f"--{name.replace('_', '-')} {why}; QAD quantizes BF16 parameters in place and needs the optimizer's "
                "float32 masters beside them. Use --bf16 --use-distributed-optimizer"
            )


def check_step(flags: MegatronFlags) -> None:
    """Refuse what runs a step, shares weights out, or saves in a way that QAD's step and exporter do not know."""
    tp, of_experts = flags.tensor_model_parallel_size, flags.expert_tensor_parallel_size
    shards = (
        (tp, flags.tensor_parallel_num_weight_shards),
        (of_experts or tp, flags.expert_tensor_parallel_num_weight_shards),
    )
    refused = {
        f"--ckpt-format {flags.ckpt_format}": (
            flags.ckpt_format != "torch_dist",
            "checkpoints of other formats can be neither checked, resumed nor exported here",
        ),
        f"--fp8-format {flags.fp8}": (
            flags.fp8,
            "the teacher would compute in it, too, and not be itself",
        ),
        f"--fp4-format {flags.fp4}": (
            flags.fp4,
            "the teacher would compute in it, too, and not be itself",
        ),
        f"--cuda-graph-impl {flags.cuda_graph_impl}": (
            flags.cuda_graph_impl != "none",
            "calibration and the teacher's pass come before the schedule that a graph would hold",
        ),
        "--overlap-moe-expert-parallel-comm": (
            flags.overlap_moe_expert_parallel_comm,
            "its schedule asks the forward step for a plan of the layers, which the step of QAD does not make",
        ),
        "--tensor-parallel-num-weight-shards": (
            any(number is not None and number > size for size, number in shards),
            "no rank has a whole row of a weight, and the shards' amaxes would be found apart",
        ),
        "--hybrid-context-parallel": (flags.hybrid_context_parallel, "its data has another shape than QAD's batches"),
    }
    for flag, (is_set, why) in refused.items():
        if is_set:
            raise QADError(f"{flag} is not supported: {why}. Leave it out")


def check_skipped(flags: MegatronFlags, options: QADOptions) -> None:
    """Refuse to leave out a step whose data calibration has read ahead: Megatron would leave out what comes next."""
    skipped = set(flags.iterations_to_skip or ())
    packed_shards = flags.dataloader_inter_document_masking and flags.tensor_model_parallel_size > 1
    if skipped and (flags.pipeline_model_parallel_size > 2 or flags.num_virtual_stages > 1 or packed_shards):
        raise QADError(
            "--iterations-to-skip: Megatron does not read the data of a skipped step in this layout (more than two "
            "pipeline stages, virtual stages, or tensor parallelism with documents kept apart). Leave it out"
        )
    if not skipped or flags.load is not None:
        return
    calibrates_at = next(step for step in range(1, len(skipped) + 2) if step not in skipped)
    last = calibrates_at + math.ceil(options.qad_calibration_samples / flags.global_batch_size)
    read_ahead = sorted(step for step in skipped if calibrates_at < step <= last)
    if read_ahead:
        raise QADError(
            f"--iterations-to-skip {read_ahead[0]}: the data of steps up to {last} is read ahead for calibration. Skip "
            "later steps, or calibrate on fewer samples (--qad-calibration-samples)"
        )


def check_saving(flags: MegatronFlags, options: QADOptions, has_teacher: bool) -> None:
    """Refuse combinations of flags that would keep something else than they say."""
    last, best = options.qad_keep_last, options.qad_keep_best
    for flag, value in (("--qad-keep-last", last), ("--qad-keep-best", best)):
        if value is not None and value < 1:
            raise QADError(f"{flag} {value}: expected a number of checkpoints, 1 or more; leave it out to keep all")
    if flags.enable_msc:
        raise QADError("--enable-msc: object stores cannot rename, which makes a checkpoint visible; use a file system")
    factor = options.qad_spike_factor
    if factor is not None and (factor <= 1 or flags.save is None):
        raise QADError(
            f"--qad-spike-factor {factor:g}: expected more than 1, and --save, whose checkpoints it goes back to"
        )
    if (last or best) and flags.save_retain_interval:
        raise QADError("--save-retain-interval removes checkpoints, too; use it or --qad-keep-last and --qad-keep-best")
    if best and not has_teacher:
        raise QADError("--qad-keep-best ranks checkpoints by their KL to the teacher; this job has no --qad-teacher")
    if best and flags.eval_iters == 0:
        raise QADError("--qad-keep-best ranks checkpoints by their validation; --eval-iters 0 asks for none")
    if factor is not None and flags.no_save_optim and not options.qad_ptq:  # which itself saves none
        raise QADError(
            "--qad-spike-factor goes back to checkpoints with their optimizer; --no-save-optim leaves it out"
        )
    if best and (not flags.eval_interval or flags.save_interval % flags.eval_interval):
        raise QADError(
            f"--qad-keep-best needs a validation at each checkpoint: --save-interval {flags.save_interval} is not a "
            f"multiple of --eval-interval {flags.eval_interval}"
        )


def check_wandb(flags: MegatronFlags) -> None:
    """Refuse flags by which wandb could not be started."""
    if flags.wandb_project and flags.wandb_exp_name == "":
        raise QADError("--wandb-exp-name '': expected the run's name in wandb, or no such flag")
    if flags.wandb_project and flags.save is None and not flags.wandb_save_dir:
        raise QADError("--wandb-project needs a directory for wandb's files: give --save or --wandb-save-dir")


def refuse_training_run(save: str | None) -> None:
    """Calibration alone saves iteration 1: in the directory of a training run that would be the newest."""
    if save is not None and any(iteration_of(path) > 1 for path in saved_iterations(save)):
        raise QADError(
            f"--save {save}: holds a training run, which --qad-ptq would set back to its start. Name another"
        )


def refuse_model_directory(save: str, models: Mapping[str, str | None]) -> None:
    """A job that saved among the files of an imported model would make them its own: an export would round them.

    Args:
        models: flag -> checkpoint directory that the job reads.
    """
    target = Path(save).resolve()
    for flag, directory in models.items():
        if directory is not None and target == Path(directory).resolve():
            raise QADError(f"--save {save}: is the directory of {flag}, which a job must not change. Name another")
    if (target / "release").exists():
        raise QADError(
            f"--save {save}: holds an imported model (release/), which a job must not change. Name another directory"
        )


def check_hidden_losses(
    flags: MegatronFlags, options: QADOptions, losses: WeightedLosses, shapes: Mapping[str, Mapping]
) -> None:
    """Refuse layers that a model does not have or that lie on different pipeline ranks, and models of different widths.

    Args:
        shapes: as ``parallelism.check_parallelism`` takes them.
    """
    terms = losses.terms_of_type(HiddenLoss)
    if not terms:
        return
    student, teacher = shapes["the student"], shapes["the teacher"]
    widths = [shape["hidden-size"] for shape in (student, teacher)]
    if widths[0] != widths[1]:
        raise QADError(
            f"--qad-loss: {terms[0].name} compares hidden states of {widths[0]} and {widths[1]} elements; it needs a "
            "teacher of the student's hidden size"
        )
    patterns = [shape["hybrid-layer-pattern"] for shape in (student, teacher)]
    pp = flags.pipeline_model_parallel_size
    virtual = (flags.num_virtual_stages, teacher_virtual_stages(len(patterns[1]), flags, options))
    ranks = [ranks_of_layers(with_stages(p, pp * v), pp) for p, v in zip(patterns, virtual, strict=True)]
    for term in terms:
        try:
            pairs = term.loss.pairs(*map(len, patterns))
        except ValueError as error:
            raise QADError(f"--qad-loss: {term.name}: {error}") from error
        for mine, theirs in pairs:
            if ranks[0][mine] != ranks[1][theirs]:
                raise QADError(
                    f"--qad-loss: {term.name} compares layer {mine} of the student, on pipeline rank {ranks[0][mine]}, "
                    f"with layer {theirs} of the teacher, on rank {ranks[1][theirs]}; choose layers on one rank "
                    "(teacher_layers=[...]) or fewer pipeline stages"
                )
