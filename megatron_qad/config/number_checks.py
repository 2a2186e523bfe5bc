"""Checks the numbers among the flags: finite, and in the range in which they have a meaning.

Megatron checks few of them, by assertions after the processes have started; others train nothing, or NaN.
"""

import argparse
import math
from collections.abc import Iterator
from typing import NamedTuple

from megatron_qad.engine.errors import QADError

MAX_CALIBRATION_SAMPLES = 1 << 16
"""At 4096 tokens each, 2^16 sequences are as many tokens as the paper's shortest training (0.3 billion)."""


class Range(NamedTuple):
    """The valid values of a flag. ``None`` means no bound."""

    lower: float | None
    upper: float | None = None
    excludes_lower: bool = False
    excludes_upper: bool = False

    def contains(self, value: float) -> bool:
        return not (
            self.lower is not None
            and (value < self.lower or self.excludes_lower and value == self.lower)
            or self.upper is not None
            and (value > self.upper or self.excludes_upper and value == self.upper)
        )

    def describe(self) -> str:
        if self.upper is None:
            return f"a number above {self.lower:g}" if self.excludes_lower else f"a number of {self.lower:g} or more"
        lower = f"above {self.lower:g}" if self.excludes_lower else f"of {self.lower:g} or more"
        return f"a number {lower} and {'below' if self.excludes_upper else 'up to'} {self.upper:g}"


_ONE_OR_MORE, _ZERO_OR_MORE, _POSITIVE = Range(1), Range(0), Range(0, excludes_lower=True)
_BELOW_ONE = Range(0, 1, excludes_upper=True)
_RANGES = {
    **dict.fromkeys(
        (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
            *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_virtual_stages_per_pipeline_rank"),
            *("seq_length", "encoder_seq_length", "micro_batch_size", "global_batch_size", "eval_micro_batch_size"),
            *("eval_global_batch_size", "make_vocab_size_divisible_by", "train_iters", "train_samples"),
            *("lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "save_interval"),
            *("save_retain_interval", "eval_interval", "log_interval", "tensorboard_log_interval", "exit_interval"),
            *("log_memory_interval", "tensorboard_queue_size", "exit_duration_in_mins", "distributed_timeout_minutes"),
            *("seed", "num_dataset_builder_threads", "qad_teacher_micro_batch_size", "qad_pad_documents_to"),
            *("qad_keep_last", "qad_keep_best"),
        ),
        _ONE_OR_MORE,
    ),
    **dict.fromkeys(
        (
            *("lr", "min_lr", "lr_warmup_init", "lr_warmup_iters", "lr_warmup_samples", "weight_decay", "clip_grad"),
            *("start_weight_decay", "end_weight_decay", "eval_iters", "start_eval_at_iter", "num_workers"),
            *("moe_aux_loss_coeff", "moe_z_loss_coeff", "manual_gc_interval", "qad_hang_timeout"),
        ),
        _ZERO_OR_MORE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "hidden_dropout", "attention_dropout"), _BELOW_ONE),
    **dict.fromkeys(("adam_eps", "init_method_std", "qad_temperature"), _POSITIVE),
    "lr_warmup_fraction": _BELOW_ONE,
    "sgd_momentum": Range(0, 1),
    "iterations_to_skip": _ONE_OR_MORE,
    "qad_calibration_samples": Range(1, MAX_CALIBRATION_SAMPLES),
    "qad_calibration_percentile": Range(0, 100, excludes_lower=True),
    "qad_calibration_headroom": Range(0, 28672, excludes_lower=True, excludes_upper=True),
    "qad_spike_factor": Range(1, excludes_lower=True),
}
"""Valid values by the name of the parsed option; for an option with several values, those of each one."""


def check_numbers(parsed: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Check all numbers that differ from their default.

    Raises:
        QADError: a number is NaN, infinite or out of its range; names the flag, the value and the range.
    """
    for action in parser._actions:
        value = getattr(parsed, action.dest, None)
        if value is action.default or not action.option_strings:
            continue
        for number in _numbers(value):
            check_number(action.dest, number, action.option_strings[0])


def check_number(option: str, value: float, name: str) -> None:
    """Check one number.

    Args:
        option: name of the parsed option, such as "qad_temperature".
        value: its value.
        name: what the error calls the option.

    Raises:
        QADError: the number is NaN, infinite or out of its range.
    """
    expected = _RANGES.get(option)
    if not math.isfinite(value):
        raise QADError(f"{name} {value}: expected a finite number.")
    if expected is not None and not expected.contains(value):
        raise QADError(f"{name} {value}: expected {expected.describe()}.")


def _numbers(value: object) -> Iterator[float]:
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, int | float) and not isinstance(number, bool):
            yield number
