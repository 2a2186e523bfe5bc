"""Rejects flags about saving, keeping and logging that contradict each other, and directories that must not change."""

import os
from collections.abc import Mapping
from pathlib import Path

from megatron_qad.config.megatron_flags import MegatronFlags
from megatron_qad.config.qad_options import QADOptions
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory.iterations import iteration_of, saved_iterations


def check_saving(flags: MegatronFlags, options: QADOptions, has_teacher: bool) -> None:
    """Reject flags about saving and keeping checkpoints that contradict each other."""
    last, best = options.qad_keep_last, options.qad_keep_best
    if flags.enable_msc:
        raise QADError(
            "--enable-msc: a checkpoint becomes visible by a rename, which object stores lack. Save to a file system."
        )
    factor = options.qad_spike_factor
    if factor is not None and (factor <= 1 or flags.save is None):
        raise QADError(
            f"--qad-spike-factor {factor:g}: expected more than 1, and --save, whose checkpoints the job rolls back to."
        )
    if (last or best) and flags.save_retain_interval:
        raise QADError(
            "--save-retain-interval removes checkpoints, too. Use either it or --qad-keep-last and --qad-keep-best."
        )
    if best and not has_teacher:
        raise QADError(
            "--qad-keep-best ranks checkpoints by their KL to the teacher; this job has no --qad-teacher. Pass one."
        )
    if best and flags.eval_iters == 0:
        raise QADError("--qad-keep-best ranks checkpoints by their validation; --eval-iters 0 turns validation off.")
    if factor is not None and flags.no_save_optim and not options.qad_ptq:  # a PTQ job never saves an optimizer
        raise QADError(
            "--qad-spike-factor rolls back to checkpoints with optimizer state, which --no-save-optim leaves out. "
            "Remove one of the two flags."
        )
    if best and (not flags.eval_interval or flags.save_interval % flags.eval_interval):
        raise QADError(
            f"--qad-keep-best needs a validation at each checkpoint: --save-interval {flags.save_interval} is not a "
            f"multiple of --eval-interval {flags.eval_interval}. Change one of them."
        )


def check_wandb(flags: MegatronFlags) -> None:
    """Check the flags that wandb needs to start."""
    if flags.wandb_project and flags.wandb_exp_name == "":
        raise QADError("--wandb-exp-name '': expected the run's name in wandb. Set a name or leave the flag out.")
    if flags.wandb_project and flags.save is None and not flags.wandb_save_dir:
        raise QADError("--wandb-project needs a directory for wandb's files. Pass --save or --wandb-save-dir.")


def check_writable(save: str) -> None:
    """Check, without creating anything, that a job could create or write its ``--save`` directory."""
    directory = Path(save).absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir():
        reason = f"Not a directory: {existing}"
    elif not os.access(existing, os.W_OK | os.X_OK):
        reason = f"no permission to write, or a read-only file system: {existing}"
    else:
        return
    raise QADError(f"--save {save}: cannot be written ({reason}). Choose another place or make it writable.")


def refuse_training_run(save: str | None) -> None:
    """Reject a training run in ``--save`` of a PTQ job, whose iteration 1 would become the newest checkpoint."""
    if save is not None and any(iteration_of(path) > 1 for path in saved_iterations(save)):
        raise QADError(
            f"--save {save}: holds a training run, which --qad-ptq would reset to its start. Choose another directory."
        )


def refuse_model_directory(save: str, models: Mapping[str, str | None]) -> None:
    """Reject ``--save`` if it is the directory of an imported model, whose files a job must not change.

    The files of the job would describe the model as quantized, and an export would round its weights.

    Args:
        models: flag -> checkpoint directory that the job reads.
    """
    target = Path(save).resolve()
    for flag, directory in models.items():
        if directory is not None and target == Path(directory).resolve():
            raise QADError(
                f"--save {save}: is the directory of {flag}, which a job must not change. Choose another directory."
            )
    if (target / "release").exists():
        raise QADError(
            f"--save {save}: holds an imported model (release/), which a job must not change. Choose another directory."
        )
