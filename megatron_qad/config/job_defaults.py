"""Flags that a job gets if the user gives none: the shape of a microbatch and the directory of TensorBoard's events."""

import math
from collections.abc import Mapping

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine.errors import QADError

_LONGEST_DEFAULT = 4096
"""Longer sequences cost more memory than a job should use without being asked; long-context models have 10^5."""

PTQ_FLAGS = {
    **{"train-iters": 1, "lr": 0.0, "min-lr": 0.0, "lr-warmup-init": 0.0, "lr-warmup-iters": 0},
    "no-save-optim": True,
}
"""A PTQ job is one iteration at learning rate 0, whatever the flags say of a training."""
IGNORED_BY_PTQ = (
    *("--train-samples", "--lr-decay-samples", "--lr-warmup-samples", "--lr-wsd-decay-samples"),
    *("--lr-decay-iters", "--lr-wsd-decay-iters", "--lr-warmup-fraction", "--lr-decay-style"),
    *("--weight-decay-incr-style", "--start-weight-decay", "--end-weight-decay"),
)


def default_flags(
    flags: MegatronFlags, options: QADOptions, max_lengths: Mapping[str, int], *, trains: bool
) -> tuple[dict[str, int | str], list[str]]:
    """Return the flags that the user left out, and what to tell the user about them.

    Args:
        max_lengths: longest sequence of each model, in tokens, by checkpoint directory.
        trains: False for a tool that takes the flags of a job.

    Returns:
        (flag without ``--`` -> value, notes for the log).
    """
    added: dict[str, int | str] = {}
    notes = []
    if flags.seq_length is None:
        added["seq-length"] = _seq_length(flags, options, max_lengths)
        limits = ", ".join(f"{length} positions in {checkpoint}" for checkpoint, length in max_lengths.items())
        length = added["seq-length"]
        notes.append(f"--seq-length {length}, because none was given ({limits}; at most {_LONGEST_DEFAULT})")
    if flags.micro_batch_size is None:
        added["micro-batch-size"] = 1
        notes.append("--micro-batch-size 1, because none was given; a larger one is faster if it fits in memory")
    if trains:
        notes += _notes_on_training(flags, options)
    if trains and flags.save is not None and flags.tensorboard_dir is None:
        added["tensorboard-dir"] = f"{flags.save}/tensorboard"
    if trains and flags.save is not None and flags.wandb_project and flags.wandb_save_dir is None:
        added["wandb-save-dir"] = flags.save  # wandb creates its directory "wandb" there
    if trains and flags.save is None and not flags.skip_train:
        notes.append(
            "WARNING: no --save: this job keeps nothing. Its weights, its curves and its calibration are lost when it "
            "ends. Add --save DIR to keep them."
        )
    return added, notes


def _notes_on_training(flags: MegatronFlags, options: QADOptions) -> list[str]:
    """Return notes on defaults of Megatron that a user would rather choose than get."""
    notes = []
    if flags.global_batch_size is None and not options.qad_ptq:
        notes.append("--global-batch-size: none was given, so a step has one microbatch per data-parallel rank")
    if not flags.bf16:
        notes.append("weights and activations in float32, because --bf16 was not given")
    if flags.data_path and flags.split is None:
        notes.append("--split 969,30,1, because none was given: 3% of the data is held out for validation")
    saves_once = flags.save_interval and flags.train_iters and flags.save_interval >= flags.train_iters
    if flags.save is not None and saves_once and not options.qad_ptq:
        notes.append(
            f"--save-interval {flags.save_interval}: the only checkpoint is the one after the last step, so a crash "
            "loses all steps. Give a smaller one to save more often"
        )
    return notes


def check_seq_length(seq_length: int, max_lengths: Mapping[str, int]) -> None:
    """Check that no sequence is longer than a model's longest one."""
    for checkpoint, length in max_lengths.items():
        if seq_length > length:
            raise QADError(
                f"--seq-length {seq_length}: is longer than the {length} positions of {checkpoint} "
                f"(max_position_embeddings). Expected at most {min(max_lengths.values())}."
            )


def _seq_length(flags: MegatronFlags, options: QADOptions, max_lengths: Mapping[str, int]) -> int:
    """Return the models' longest sequence, up to a limit, as a multiple of what the parallelism needs."""
    cp = flags.context_parallel_size
    tp = flags.tensor_model_parallel_size if flags.sequence_parallel else 1
    multiple = math.lcm(2 * cp if cp > 1 else 1, cp * tp, options.qad_pad_documents_to or 1)
    longest = min(_LONGEST_DEFAULT, *max_lengths.values())
    return max(longest // multiple, 1) * multiple
