"""Rolls a running job back to its last good checkpoint.

Weights, optimizer and learning rate are loaded from the checkpoint; the data continues from its current position. So
the batches since the checkpoint, including those that caused the spike, have no effect and are not repeated. A job that
is killed and resumed meets the same spike and rolls back in the same way.
"""

import argparse
from pathlib import Path

from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.training import print_rank_0
from megatron.training import training as megatron_loop
from megatron.training.checkpointing import load_checkpoint

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.loop import gather_parameters
from megatron_qad.engine.run_directory.resume_point import latest_valid_checkpoint

_DATA_POSITION = ("iteration", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
"""Megatron's arguments that count the consumed data."""


def roll_back(args: argparse.Namespace, model, optimizer, scheduler, rejected: set[int]) -> set[int]:
    """Load the newest valid checkpoint of ``--save`` that is not ``rejected``. Every rank calls this between two steps.

    Args:
        args: Megatron's global arguments, in which its loop counts.

    Returns:
        The checkpoint's iteration; empty if there is no checkpoint yet.

    Raises:
        QADError: all valid checkpoints are rejected.
    """
    step = args.curr_iteration + 1
    megatron_loop.maybe_finalize_async_save(blocking=True)
    root = Path(args.save)
    iteration = latest_valid_checkpoint(root, step - 1, rejected)  # later ones belong to a run that was set back
    if iteration is None and not rejected:
        print_rank_0(f"megatron_qad: WARNING: no checkpoint yet: only the batch of step {step} is skipped")
        return set()
    if iteration is None:
        raise QADError(
            f"step {step}: the loss spikes again from every checkpoint in {root}. Start again from an earlier one or "
            "with a lower learning rate."
        )
    gather_parameters(model)  # no gather may be in flight while weights are loaded
    position = {name: getattr(args, name) for name in _DATA_POSITION}
    load_args = {name: getattr(args, name) for name in ("load", "ckpt_step", "finetune", "no_load_optim")}
    vars(args).update(load=args.save, ckpt_step=iteration, finetune=False, no_load_optim=False)
    scheduler.num_steps = 0  # Megatron's loading adds the checkpoint's steps to it
    try:
        load_checkpoint(model, optimizer, scheduler)
    finally:
        samples = args.consumed_train_samples
        vars(args).update(load_args | position)
    update_num_microbatches(args.consumed_train_samples, consistency_check=False)
    print_rank_0(
        f"megatron_qad: WARNING: rolled back to the checkpoint of iteration {iteration}. The batches of steps "
        f"{iteration + 1} to {step} (samples {samples} to {args.consumed_train_samples + args.global_batch_size - 1}) "
        "are skipped"
    )
    return {iteration}
