"""Keeps a run's checkpoints: goes on when one could not be saved, and removes those that are neither new nor good.

Below it ``engine.run_directory.atomic_checkpoint`` makes a checkpoint complete or invisible. Left out: what is in a
checkpoint, which is Megatron's.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.training import print_rank_0
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.events import Callback, Save
from megatron_qad.engine.run_directory import atomic_checkpoint, manifest
from megatron_qad.engine.run_directory.atomic_checkpoint import AtomicCheckpoints, SaveFailed, on_first_rank
from megatron_qad.engine.run_directory.iterations import iteration_of, saved_iterations
from megatron_qad.engine.run_directory.resume_point import read_tracker
from megatron_qad.engine.run_directory.run_files import TRACKER
from megatron_qad.training.callbacks.best_checkpoints import BestCheckpoints


class CheckpointKeeper(Callback):
    """``--qad-keep-last`` and ``--qad-keep-best``, and saves that fail.

    Args:
        best: ranks the checkpoints.
    """

    def __init__(self, job, best: BestCheckpoints):
        self._job, self._ranking = job, best
        options = job.config.options
        self._last, self._best = options.qad_keep_last, options.qad_keep_best
        self.failed: str | None = None
        """What is to be said of the newest save, if it failed."""

    @property
    def _root(self) -> Path:
        return Path(self._job.args.save)

    def save_begins(self, save: Save) -> None:
        if save.iteration is not None:
            on_first_rank(lambda: _check_room(self._root, save.iteration))

    def save_ended(self, save: Save) -> None:
        """
        Raises:
            QADError: it failed where no other save follows.
        """
        if save.error is not None:
            self._survive(save)
            return
        if save.iteration is not None:  # the wait for a save in the background says nothing of one that did not begin
            self.failed = None
        if torch.distributed.get_rank() == 0 and (self._last or self._best):
            for directory in self._superfluous(self._root):
                print_rank_0(f"megatron_qad: removing {directory.name}, neither among the last nor the best")
                gone = directory.with_name(directory.name + atomic_checkpoint.REMOVED)
                directory.rename(gone)  # at once; what follows may take a while
                shutil.rmtree(gone)

    def job_ends(self, is_done: bool) -> None:
        """
        Raises:
            QADError: the job leaves early, and the save before that failed.
        """
        if not is_done and self.failed is not None:
            raise QADError(f"{self.failed}. The job ends here and its last steps are not saved: make room, resume")

    def _survive(self, save: Save) -> None:
        root = self._root
        on_first_rank(lambda: _remove_traces(root, save.iteration))
        tracked = read_tracker(root) or "none"
        what = "the checkpoint" if save.iteration is None else f"the checkpoint of iteration {save.iteration}"
        reason = _reason(save.error, self._job.saves)
        self.failed = said = f"{what} could not be saved: {reason}. The last good one is {tracked}, in {root}"
        if save.is_last:
            raise QADError(
                f"{said}. Training has ended and its last steps are not saved: make room, resume"
            ) from save.error
        print_rank_0(f"megatron_qad: ERROR: {said}. The job goes on; the next save is at the next interval")
        save.is_survived = True

    def _superfluous(self, root: Path) -> Iterator[Path]:
        if not (root / TRACKER).is_file():
            return
        whole = [path for path in saved_iterations(root) if (path / manifest.FILE).is_file()]
        ranked = self._ranking.ranked([iteration_of(path) for path in whole])
        if self._best and not self._last and len(ranked) < self._best:
            return  # what was never validated is not worse than what was
        keep = {int((root / TRACKER).read_text())} | {iteration_of(path) for path in whole[: self._last or 0]}
        keep |= set(ranked[: self._best or 0])
        for path in whole:
            # Newer than the tracker: of a run that was set back.
            if iteration_of(path) not in keep and iteration_of(path) < max(keep):
                yield path


def _check_room(root: Path, iteration: int) -> None:
    """Make the directory that Megatron would make on one rank, and refuse to start what cannot be finished."""
    (root / f"iter_{iteration:07d}").mkdir(parents=True, exist_ok=True)
    needed = max((manifest.num_bytes(path) for path in saved_iterations(root)[:2]), default=0)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise SaveFailed(f"{root} has {free / 1e9:.3g} GB free; the checkpoint before took {needed / 1e9:.3g} GB")


def _remove_traces(root: Path, iteration: int | None) -> None:
    """What a failed save left takes the room that the next one needs. None: whichever asynchronous one it was."""
    atomic_checkpoint.clear_away(root, "" if iteration is None else f"iter_{iteration:07d}")
    for path in saved_iterations(root):
        if not any(path.iterdir()):
            path.rmdir()


def _reason(error: BaseException, saves: AtomicCheckpoints) -> str:
    """The first line that says something, of torch's collection of every rank's traceback."""
    if not isinstance(error, CheckpointException):
        return str(error)
    found = {rank: str(problem[0]) for rank, problem in error.failures.items()}
    rank = min(found, default=None)
    if not found:
        return "another rank's writer failed, which the first rank names"
    # torch does not say why a write failed.
    return f"rank {rank}: {found[rank]} (disk: {saves.free_after_writing / 1e6:.3g} MB were free then)"
