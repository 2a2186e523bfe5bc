"""Back to the last good checkpoint, within the running job.

Weights, optimizer and learning rate become those of the checkpoint; the data goes on where it is. So the batches since
the checkpoint, with those that led to the spike, have left no trace and do not come again. A job that is killed and
resumed runs into the same spike and does the same.
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

_OF_THE_LOOP = ("iteration", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
"""What Megatron keeps in its args of how far the data is."""


def roll_back(args: argparse.Namespace, model, optimizer, scheduler, rejected: set[int]) -> set[int]:
    """Load the newest whole checkpoint of ``--save`` that is not ``rejected``; its iteration, or none if there is no
    checkpoint yet. Every rank calls this, between two steps.

    Args:
        args: Megatron's global arguments, in which its loop counts.

    Raises:
        QADError: all whole checkpoints are rejected.
    """
    step = args.curr_iteration + 1
    megatron_loop.maybe_finalize_async_save(blocking=True)
    root = Path(args.save)
    iteration = latest_valid_checkpoint(root, step - 1, rejected)  # later ones are of a run that was set back
    if iteration is None and not rejected:
        print_rank_0(f"megatron_qad: WARNING: no checkpoint yet: the batch of step {step} is left out, nothing else")
        return set()
    if iteration is None:
        raise QADError(
            f"step {step}: the loss spikes again from every checkpoint in {root}. Start again from an earlier one or "
            "with a lower learning rate"
        )
    gather_parameters(model)  # none is on its way any more
    place = {name: getattr(args, name) for name in _OF_THE_LOOP}
    given = {name: getattr(args, name) for name in ("load", "ckpt_step", "finetune", "no_load_optim")}
    vars(args).update(load=args.save, ckpt_step=iteration, finetune=False, no_load_optim=False)
    scheduler.num_steps = 0  # Megatron's loading adds the checkpoint's to it
    try:
        load_checkpoint(model, optimizer, scheduler)
    finally:
        samples = args.consumed_train_samples
        vars(args).update(given | place)
    update_num_microbatches(args.consumed_train_samples, consistency_check=False)
    print_rank_0(
        f"megatron_qad: WARNING: rolled back to the checkpoint of iteration {iteration}. The batches of steps "
        f"{iteration + 1} to {step} (samples {samples} to {args.consumed_train_samples + args.global_batch_size - 1}) "
        "are left out"
    )
    return {iteration}
