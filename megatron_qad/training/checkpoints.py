"""Which checkpoint a job resumes from, which ones it keeps, and how it goes on when one could not be saved.

The two functions of Megatron's loop in which every save of a job ends, ``save_checkpoint`` and, for asynchronous ones,
``maybe_finalize_async_save``, are wrapped: below them ``whole_saves`` makes a checkpoint complete or invisible; here a
save that failed is said and survived, and old checkpoints are removed. Left out: what is in a checkpoint, which
is Megatron's.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from megatron.training import get_args, print_rank_0
from megatron.training import training as megatron_loop
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qad.engine import QADError
from megatron_qad.engine.heartbeat import heartbeat
from megatron_qad.engine.run_directory import locks, manifest, whole_saves
from megatron_qad.engine.run_directory.run_files import OF_A_RUN, TRACKER, text_of_record
from megatron_qad.engine.run_directory.whole_saves import SaveFailed, on_first_rank
from megatron_qad.models.weights import is_number, iteration_of, saved_iterations
from megatron_qad.training.best import best_checkpoints


def check_options(args: argparse.Namespace) -> None:
    """Refuse combinations of flags that would keep something else than they say."""
    last, best = args.qad.qad_keep_last, args.qad.qad_keep_best
    for flag, value in (("--qad-keep-last", last), ("--qad-keep-best", best)):
        if value is not None and value < 1:
            raise QADError(f"{flag} {value}: expected a number of checkpoints, 1 or more; leave it out to keep all")
    if args.enable_msc:
        raise QADError("--enable-msc: object stores cannot rename, which makes a checkpoint visible; use a file system")
    factor = args.qad.qad_spike_factor
    if factor is not None and (factor <= 1 or args.save is None):
        raise QADError(
            f"--qad-spike-factor {factor:g}: expected more than 1, and --save, whose checkpoints it goes back to"
        )
    if (last or best) and args.save_retain_interval:
        raise QADError("--save-retain-interval removes checkpoints, too; use it or --qad-keep-last and --qad-keep-best")
    if best and args.teacher_hf_config is None:
        raise QADError("--qad-keep-best ranks checkpoints by their KL to the teacher; this job has no --qad-teacher")
    if best and not args.eval_iters:
        raise QADError("--qad-keep-best ranks checkpoints by their validation; --eval-iters 0 asks for none")
    if factor is not None and args.no_save_optim and not args.qad.qad_ptq:  # which itself saves none
        raise QADError(
            "--qad-spike-factor goes back to checkpoints with their optimizer; --no-save-optim leaves it out"
        )
    if best and (not args.eval_interval or args.save_interval % args.eval_interval):
        raise QADError(
            f"--qad-keep-best needs a validation at each checkpoint: --save-interval {args.save_interval} is not a "
            f"multiple of --eval-interval {args.eval_interval}"
        )


def refuse_training_run(save: str | None) -> None:
    """Calibration alone saves iteration 1: in the directory of a training run that would be the newest."""
    if save is not None and any(iteration_of(path) > 1 for path in saved_iterations(save)):
        raise QADError(
            f"--save {save}: holds a training run, which --qad-ptq would set back to its start. Name another"
        )


def refuse_models_directory(save: str, models: Mapping[str, str | None]) -> None:
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


def own(save: str) -> None:
    """Before anything is written to ``--save``: no other job may write there until this one ends.

    The first rank asks, because the ranks do not know each other yet; if it is refused, the launcher ends the others.
    """
    if os.environ.get("RANK", "0") == "0":
        locks.hold(save, "--save")


def settle_and_install(args: argparse.Namespace) -> None:
    """Before anything is loaded, on every rank, once a process."""
    iteration = settle(args)
    if args.save is not None:
        is_same = args.load is not None and Path(args.load).resolve() == Path(args.save).resolve()
        best_checkpoints.start(Path(args.save), iteration if is_same else 0)
        for name in OF_A_RUN:
            whole_saves.texts_beside[name] = partial(text_of_record, args.save, name)
    wrap_saving(args)
    hang_seconds = args.qad.qad_hang_seconds
    if hang_seconds is None:
        hang_seconds = 0.9 * 60 * args.distributed_timeout_minutes
    if hang_seconds > 0:
        directory = Path(args.save) / "heartbeats" if args.save is not None else None
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        heartbeat.start(directory, rank, size, hang_seconds)


# Loading ------------------------------------------------------------------------------------------------------------


def settle(args: argparse.Namespace) -> int:
    """Point ``--load`` at its newest whole checkpoint and clear away what a killed job left.

    The tracker's checkpoint is taken if it is whole; otherwise the newest whole one before it, and the tracker is moved
    there. A tracker that is missing, or was cut off while it was written, stands for the newest.

    Returns:
        The iteration to resume at; 0 if there is nothing to resume.

    Raises:
        QADError: there are checkpoints and none is whole, or the one that ``--ckpt-step`` names is not.
    """
    if args.save is not None:
        on_first_rank(lambda: whole_saves.clear_away(Path(args.save)))
    if args.load is None or not holds_checkpoints(args.load):
        return 0
    root = Path(args.load)
    tracked = _tracked(root)
    if args.ckpt_step or tracked == "release":
        manifest.require_whole(root / (f"iter_{args.ckpt_step:07d}" if args.ckpt_step else "release"))
        return args.ckpt_step or 0
    refused = []
    for directory in saved_iterations(root):
        if is_number(tracked) and int(tracked) < iteration_of(directory):
            continue
        wrong = manifest.faults_shared(directory)
        if not wrong:
            _move_tracker(root, directory, tracked, refused)
            return iteration_of(directory)
        refused.append(f"{directory.name} ({'; '.join(wrong[:3])})")
        print_rank_0(f"megatron_qad: WARNING: {root}: refusing {refused[-1]}")
    raise QADError(
        f"--load {root}: {TRACKER} says {tracked!r} and no checkpoint is whole: "
        f"{'; '.join(refused) or 'none is there'}. Take another directory, or empty this one to start anew"
    )


def holds_checkpoints(root: str | Path) -> bool:
    """Whether a job would resume from ``root``: a tracker is there, or checkpoints that lost theirs."""
    return (Path(root) / TRACKER).is_file() or bool(saved_iterations(root))


def _tracked(root: Path) -> str:
    file = root / TRACKER
    return file.read_text(errors="replace").strip() if file.is_file() else ""


def _move_tracker(root: Path, directory: Path, tracked: str, refused: list[str]) -> None:
    if tracked == str(iteration_of(directory)):
        return
    if not refused and is_number(tracked):
        print_rank_0(f"megatron_qad: WARNING: {root}: iter_{int(tracked):07d}, which {TRACKER} names, is not there")
    says = f"says {tracked!r}" if (root / TRACKER).is_file() else "is not there"
    print_rank_0(
        f"megatron_qad: WARNING: {root}: {TRACKER} {says}; resuming from {directory.name}, the newest whole one"
    )
    on_first_rank(lambda: manifest.write_atomically(root / TRACKER, str(iteration_of(directory))))


def newest_whole(root: Path, upto: int, but: set[int]) -> int | None:
    """The newest whole checkpoint of an iteration up to ``upto``, left out those of ``but``. Every rank calls this."""
    for directory in saved_iterations(root):
        iteration = iteration_of(directory)
        if iteration <= upto and iteration not in but and not manifest.faults_shared(directory):
            return iteration
    return None


# Saving -------------------------------------------------------------------------------------------------------------


def wrap_saving(args: argparse.Namespace) -> None:
    save, finalize = megatron_loop.save_checkpoint, megatron_loop.maybe_finalize_async_save
    keeper = _Keeper(args.qad.qad_keep_last, args.qad.qad_keep_best)

    def save_checkpoint(iteration, *rest, **named):
        def saves():
            heartbeat.beat("save", is_long=True)
            on_first_rank(lambda: _check_room(Path(get_args().save), iteration))
            return save(iteration, *rest, **named)

        keeper.survive(saves, iteration, at_end=iteration >= get_args().train_iters)

    def maybe_finalize_async_save(*rest, **named):
        if named.get("blocking"):
            heartbeat.beat("end of a save", is_long=True)
        keeper.survive(lambda: finalize(*rest, **named), at_end=named.get("terminate", False))

    decide = megatron_loop.checkpoint_and_decide_exit

    def checkpoint_and_decide_exit(*rest, **named):
        exits = decide(*rest, **named)
        if exits and keeper.failed is not None:
            raise QADError(f"{keeper.failed}. The job ends here and its last steps are not saved: make room, resume")
        return exits

    megatron_loop.checkpoint_and_decide_exit = checkpoint_and_decide_exit
    megatron_loop.save_checkpoint = save_checkpoint
    if args.async_save:
        megatron_loop.maybe_finalize_async_save = maybe_finalize_async_save


def _check_room(root: Path, iteration: int) -> None:
    """Make the directory that Megatron would make on one rank, and refuse to start what cannot be finished."""
    (root / f"iter_{iteration:07d}").mkdir(parents=True, exist_ok=True)
    needed = max((manifest.num_bytes(path) for path in saved_iterations(root)[:2]), default=0)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise SaveFailed(f"{root} has {free / 1e9:.3g} GB free; the checkpoint before took {needed / 1e9:.3g} GB")


class _Keeper:
    """Says which saves failed, and removes the checkpoints that are neither new nor good."""

    def __init__(self, keep_last: int | None, keep_best: int | None):
        self._last, self._best = keep_last, keep_best
        self.failed: str | None = None
        """What is to be said of the newest save, if it failed."""

    def survive(self, work: Callable[[], None], iteration: int | None = None, at_end: bool = False) -> None:
        """Do ``work``, after which a checkpoint may be there that was not.

        Raises:
            QADError: it failed ``at_end``, where no other save follows.
        """
        try:
            work()
            self.failed = None
        except (SaveFailed, CheckpointException) as error:
            root = Path(get_args().save)
            on_first_rank(lambda: _remove_traces(root, iteration))
            tracked = _tracked(root) or "none"
            what = "the checkpoint" if iteration is None else f"the checkpoint of iteration {iteration}"
            self.failed = said = (
                f"{what} could not be saved: {_reason(error)}. The last good one is {tracked}, in {root}"
            )
            if at_end:
                raise QADError(
                    f"{said}. Training has ended and its last steps are not saved: make room, resume"
                ) from error
            print_rank_0(f"megatron_qad: ERROR: {said}. The job goes on; the next save is at the next interval")
            return
        if torch.distributed.get_rank() == 0 and (self._last or self._best):
            for directory in self._superfluous(Path(get_args().save)):
                print_rank_0(f"megatron_qad: removing {directory.name}, neither among the last nor the best")
                gone = directory.with_name(directory.name + whole_saves.REMOVED)
                directory.rename(gone)  # at once; what follows may take a while
                shutil.rmtree(gone)

    def _superfluous(self, root: Path) -> Iterator[Path]:
        if not (root / TRACKER).is_file():
            return
        whole = [path for path in saved_iterations(root) if (path / manifest.FILE).is_file()]
        ranked = best_checkpoints.ranked([iteration_of(path) for path in whole])
        if self._best and not self._last and len(ranked) < self._best:
            return  # what was never validated is not worse than what was
        keep = {int((root / TRACKER).read_text())} | {iteration_of(path) for path in whole[: self._last or 0]}
        keep |= set(ranked[: self._best or 0])
        for path in whole:
            # Newer than the tracker: of a run that was set back.
            if iteration_of(path) not in keep and iteration_of(path) < max(keep):
                yield path


def _remove_traces(root: Path, iteration: int | None) -> None:
    """What a failed save left takes the room that the next one needs. None: whichever asynchronous one it was."""
    whole_saves.clear_away(root, "" if iteration is None else f"iter_{iteration:07d}")
    for path in saved_iterations(root):
        if not any(path.iterdir()):
            path.rmdir()


def _reason(error: BaseException) -> str:
    """The first line that says something, of torch's collection of every rank's traceback."""
    if not isinstance(error, CheckpointException):
        return str(error)
    found = {rank: str(fault[0]) for rank, fault in error.failures.items()}
    rank = min(found, default=None)
    if not found:
        return "another rank's writer failed, which the first rank names"
    # torch does not say why a write failed.
    return f"rank {rank}: {found[rank]} (disk: {whole_saves.free_after_writing / 1e6:.3g} MB were free then)"
