"""What QADTrainer refuses, and what it sets, among the arguments of transformers' Trainer."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainingArguments

from megatron_qad.config.number_checks import check_number
from megatron_qad.engine.errors import QADError

_REFUSED = {
    "fp16": "use bf16=True",
    "fp16_full_eval": "evaluations run as training does",
    "bf16_full_eval": "it would round the masters; evaluations run as training does",
    "fsdp": "use DDP, or megatron-qad train for models that need sharding",
    "deepspeed": "use DDP, or megatron-qad train for models that need sharding",
    "label_smoothing_factor": "the loss has the teacher's distribution",
    "neftune_noise_alpha": "student and teacher must have the same inputs",
    "use_liger_kernel": "it replaces modules that are quantized",
    "torch_compile": "the quantized weights change outside of the graph",
}
"""Arguments that must be off, and what to do instead."""


def check_arguments(
    args: TrainingArguments, kwargs: Mapping[str, Any], student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    """Check arguments before ``Trainer`` reads them, and set those of DDP that have one right value.

    Raises:
        QADError: an argument that QADTrainer does not support, or teacher and student that cannot be compared.
    """
    for name, advice in _REFUSED.items():
        if getattr(args, name, None):
            raise QADError(
                f"TrainingArguments.{name} is {getattr(args, name)!r}: QADTrainer does not support it; {advice}."
            )
    for name in ("model_init", "compute_loss_func"):
        if kwargs.get(name) is not None:
            raise QADError(f"QADTrainer: {name} is not supported. Pass a quantized model, and the loss as loss='kl'.")
    if not args.average_tokens_across_devices:
        raise QADError(
            "TrainingArguments.average_tokens_across_devices is False: processes with fewer tokens would weigh more. "
            "Leave it True."
        )
    if args.n_gpu > 1:
        raise QADError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported. Start one process for each: torchrun "
            f"--nproc-per-node {args.n_gpu} train.py, or set CUDA_VISIBLE_DEVICES."
        )
    if teacher is student:
        raise QADError("the teacher is the student itself. Load the model a second time, without quantize_model.")
    if hasattr(teacher, "qad_quantization"):
        raise QADError("the teacher is quantized. Load the original model, without quantize_model.")
    if (found := teacher.config.vocab_size) != (expected := student.config.vocab_size):
        raise QADError(f"the teacher has a vocabulary of {found}, the student of {expected}. Use models with the same.")
    if args.ddp_broadcast_buffers is None:
        args.ddp_broadcast_buffers = False  # all processes compute the same scales
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every parameter gets a gradient


def check_settings(**settings: float | None) -> None:
    """Check QADTrainer's own numbers, which have the ranges of the flags ``--qad-*``. None is a setting not given.

    Raises:
        QADError: a number out of its range, or two settings that contradict each other.
    """
    for name, value in settings.items():
        if value is not None:
            check_number(f"qad_{name}", value, name)
    if settings["calibration_percentile"] is not None and settings["calibration_headroom"] is not None:
        raise QADError("calibration_percentile and calibration_headroom both set the amax of inputs. Choose one.")


def check_trainer(trainer: Trainer) -> None:
    """Check what accelerate's own configuration may have turned on."""
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        if getattr(trainer, name):
            raise QADError(f"accelerate's configuration: {name}. {_REFUSED['fsdp'].capitalize()}.")
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        raise QADError("accelerate's parallelism_config is set. QADTrainer has data parallelism (DDP) only.")
    if trainer.accelerator.mixed_precision not in ("no", "bf16"):
        raise QADError(f"accelerate's mixed precision is {trainer.accelerator.mixed_precision}. Use bf16 or none.")


def max_lr_of(trainer: Trainer) -> float | None:
    """Return a bound of the distance by which a step moves a weight, for the validator; None if there is none.

    The updates of Adam are about the learning rate or less; those of other optimizers depend on the gradient.
    """
    is_adam = str(getattr(trainer.args.optim, "value", trainer.args.optim)).startswith("adamw")
    is_own = trainer.optimizer_cls_and_kwargs is not None
    return float(trainer.args.learning_rate) if is_adam and not is_own else None
