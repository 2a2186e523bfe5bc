"""Checks that a checkpoint fits the flags with which a job resumes from it, before Megatron loads it."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import load_content_metadata
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.training import print_rank_0

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.iterations import is_number
from megatron_qad.engine.run_directory.resume_point import read_tracker
from megatron_qad.engine.run_directory.run_files import METRICS_FILE

_RESHARDABLE = ("fully_reshardable", "fully_sharded_model_space")


def check_resume(directory: Path, args: argparse.Namespace) -> bool:
    """Check the schedule and the parallelism of the checkpoint in ``directory``.

    Args:
        directory: one iteration, whose files are valid.
        args: validated arguments of Megatron.

    Returns:
        Whether the checkpoint is that of the last iteration, so that nothing is left to train.

    Raises:
        QADError: Megatron would refuse to load the checkpoint; names the flags.
    """
    if args.no_load_optim or args.finetune or args.skip_train:
        return False
    state = load_common_state_dict(str(directory))
    saved = state.get("args")
    if saved is None or getattr(saved, "no_save_optim", False):
        return False
    _check_optimizer(directory, args, saved)
    _check_parallelism(directory, args, saved, load_content_metadata(preloaded_state_dict=state) or {})
    _check_schedule(directory, args, state.get("opt_param_scheduler") or {})
    return bool(args.train_iters) and state.get("iteration", 0) >= args.train_iters


def nothing_to_do(root: Path, iteration: int, args: argparse.Namespace) -> bool:
    """Whether a job that resumes from its last iteration has also validated it. Says what follows. Collective.

    A job that was killed in its last validation validates when it is started again. So does one that reads the
    checkpoint of another run, or saves nothing.
    """
    is_own = args.save is not None and Path(args.save).resolve() == root.resolve()
    answer = [is_own and (args.eval_iters == 0 or _is_validated(root / METRICS_FILE, iteration))]
    torch.distributed.broadcast_object_list(answer, src=0)  # a file system may show the ranks different files
    saved = f"iteration {iteration} of {args.train_iters} is already saved in {root}"
    if answer[0]:
        print_rank_0(
            f"megatron_qad: nothing to do: {saved}. To continue, raise --train-iters and add "
            "--override-opt-param-scheduler. To validate it again, add --skip-train."
        )
    else:
        print_rank_0(f"megatron_qad: nothing to train: {saved}. It is validated.")
    return answer[0]


def _is_validated(metrics: Path, iteration: int) -> bool:
    """Whether the metrics file of a run has a validation of an iteration that no later start has replaced."""
    found, last = False, 0
    lines = metrics.read_text(errors="replace").splitlines() if metrics.is_file() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # a killed job may leave a part of a row
            row = json.loads(line)
            found = found and row["step"] >= last  # a lower step: a later start resumed from before the validation
            last = row["step"]
            found = found or (last == iteration and any(name.startswith("validation/") for name in row))
    return found


def checkpoint_to_resume(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint from which a job would resume if it is valid, without changing anything; None if none is.

    A job that finds it damaged resumes from an older one (``select_resume_checkpoint``).
    """
    if args.load is None:
        return None
    root = Path(args.load)
    tracked = str(args.ckpt_step or read_tracker(root))
    if not is_number(tracked):
        return None
    directory = root / f"iter_{int(tracked):07d}"
    return None if manifest.find_problems(directory) else directory


def _check_optimizer(directory: Path, args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Check that the optimizer is of the same kind. Megatron does not convert the state of one into that of another."""
    before, now = (source.use_distributed_optimizer for source in (saved, args))
    if before != now:
        raise QADError(
            f"--use-distributed-optimizer: {directory} was saved with{'' if before else 'out'} it, and this job has it "
            f"{'on' if now else 'off'}. {'Add' if before else 'Remove'} the flag, or add --no-load-optim to start with "
            "a new optimizer."
        )
    if args.num_experts is None or _has_expert_optimizer(saved) == _has_expert_optimizer(args):
        return
    raise QADError(
        f"--expert-model-parallel-size {args.expert_model_parallel_size}: {directory} was saved with "
        f"{saved.expert_model_parallel_size}. With expert parallelism, or an expert tensor-parallel size of its own, "
        "the experts have a separate optimizer, and its state cannot be converted. Resume with an EP that is also "
        f"{'above 1' if _has_expert_optimizer(saved) else '1'}, or add --no-load-optim to start with a new optimizer."
    )


def _has_expert_optimizer(args: argparse.Namespace) -> bool:
    """Whether Megatron reduces the gradients of experts over other groups than those of the rest of the model."""
    return args.expert_model_parallel_size > 1 or args.expert_tensor_parallel_size != args.tensor_model_parallel_size


def _check_parallelism(directory: Path, args: argparse.Namespace, saved: argparse.Namespace, metadata: dict) -> None:
    if not args.use_distributed_optimizer or metadata.get("distrib_optim_sharding_type") in _RESHARDABLE:
        return
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    before, now = ([getattr(source, name, 1) for name in names] for source in (saved, args))
    for name, old, new in zip(names, before, now, strict=True):
        if old != new:
            raise QADError(
                f"--{name.replace('_', '-')} {new}: {directory} was saved with {old} and without "
                "--dist-ckpt-optim-fully-reshardable, so its optimizer state cannot be divided in another way. Resume "
                f"with TP {before[0]}, PP {before[1]} and EP {before[2]} and save once without "
                "--no-dist-ckpt-optim-fully-reshardable, or add --no-load-optim to start with a new optimizer."
            )


def _check_schedule(directory: Path, args: argparse.Namespace, saved: dict) -> None:
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    for flag, key, value, samples in _schedule(args):
        if key in saved and saved[key] != value:
            unit = f" steps of {args.global_batch_size} samples" if samples else ""
            old, new = (x / args.global_batch_size if samples else x for x in (saved[key], value))
            raise QADError(
                f"{flag}: the schedule of {directory} has {_text(old)}{unit}, these flags give {_text(new)}{unit}. Add "
                "--override-opt-param-scheduler to follow these flags, or --use-checkpoint-opt-param-scheduler to keep "
                "the schedule of the checkpoint."
            )


def _schedule(args: argparse.Namespace) -> Iterator[tuple[str, str, float | str, bool]]:
    """Yield (flag, key in the checkpoint, value, whether it is in samples), as Megatron's scheduler has them."""
    if args.train_samples:
        unit, scale, total = "samples", 1, args.train_samples
        decay, warmup = args.lr_decay_samples, args.lr_warmup_samples
    else:
        unit, scale, total = "iters", args.global_batch_size, args.train_iters
        decay, warmup = args.lr_decay_iters, args.lr_warmup_iters
    end = (total if decay is None else decay) * scale
    warmup = warmup * scale if args.lr_warmup_fraction is None else args.lr_warmup_fraction * end
    yield "--lr", "max_lr", args.lr, False
    yield "--min-lr", "min_lr", args.min_lr, False
    yield f"--lr-warmup-{unit}", "lr_warmup_steps", warmup, True
    yield f"--train-{unit}" if decay is None else f"--lr-decay-{unit}", "lr_decay_steps", end, True
    yield "--lr-decay-style", "lr_decay_style", args.lr_decay_style, False
    yield "--weight-decay", "start_wd", args.start_weight_decay, False
    yield "--weight-decay", "end_wd", args.end_weight_decay, False
    yield f"--train-{unit}", "wd_incr_steps", total * scale, True
    yield "--weight-decay-incr-style", "wd_incr_style", args.weight_decay_incr_style, False


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
