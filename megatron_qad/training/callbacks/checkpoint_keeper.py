"""Continues after a failed save, and deletes checkpoints that are neither among the newest nor among the best.

``engine.run_directory.atomic_checkpoint`` makes sure that a visible checkpoint is complete. Megatron writes its
content.
"""

import shutil
import time
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
    """Implements ``--qad-keep-last`` and ``--qad-keep-best``, and handles failed saves.

    Args:
        best: ranking of the checkpoints.
    """

    def __init__(self, job, best: BestCheckpoints):
        self._job, self._ranking = job, best
        options = job.config.options
        self._last, self._best = options.qad_keep_last, options.qad_keep_best
        self._began = time.time()
        self.failed: str | None = None
        """Error message of the newest save if it failed, otherwise None."""

    @property
    def _root(self) -> Path:
        return Path(self._job.args.save)

    def save_begins(self, save: Save) -> None:
        if save.iteration is not None:
            self._began = time.time()
            on_first_rank(lambda: _check_free_space(self._root, save.iteration))

    def save_ended(self, save: Save) -> None:
        """
        Raises:
            QADError: the save failed and no other save follows.
        """
        if save.error is not None:
            self._handle_failure(save)
            return
        if save.iteration is not None:  # None: a wait for background saves, also if an earlier save did not begin
            self.failed = None
            verb = "began to save" if self._job.args.async_save else "saved"
            print_rank_0(f"megatron_qad: {verb} iteration {save.iteration} in {time.time() - self._began:.2g} s")
        if torch.distributed.get_rank() == 0 and (self._last or self._best):
            for directory in self._unneeded(self._root):
                removed = directory.with_name(directory.name + atomic_checkpoint.REMOVED)
                directory.rename(removed)  # atomic, while the deletion may take long
                shutil.rmtree(removed)
                print_rank_0(f"megatron_qad: removed iteration {iteration_of(directory)} (keeps {self._kept()})")

    def job_ends(self, is_done: bool) -> None:
        """
        Raises:
            QADError: the job ends early, and its last save failed.
        """
        if not is_done and self.failed is not None:
            raise QADError(f"{self.failed}. The job ends here and its last steps are not saved. Free space and resume.")

    def _handle_failure(self, save: Save) -> None:
        root = self._root
        on_first_rank(lambda: _remove_partial_files(root, save.iteration))
        tracked = read_tracker(root) or "none"
        name = "the checkpoint" if save.iteration is None else f"the checkpoint of iteration {save.iteration}"
        reason = _reason(save.error, self._job.saves)
        self.failed = message = f"{name} could not be saved: {reason}. The last good one is {tracked}, in {root}"
        if save.is_last:
            raise QADError(
                f"{message}. Training has ended and its last steps are not saved. Free space and resume."
            ) from save.error
        print_rank_0(f"megatron_qad: ERROR: {message}. The job continues; the next save is at the next interval")
        save.is_survived = True

    def _kept(self) -> str:
        """Return what is kept, such as "the last 2 and the best 3"."""
        kinds = {"last": self._last, "best": self._best}
        return " and ".join(f"the {kind} {number}" for kind, number in kinds.items() if number)

    def _unneeded(self, root: Path) -> Iterator[Path]:
        if not (root / TRACKER).is_file():
            return
        complete = [path for path in saved_iterations(root) if (path / manifest.FILE).is_file()]
        ranked = self._ranking.ranked([iteration_of(path) for path in complete])
        if self._best and not self._last and len(ranked) < self._best:
            return  # checkpoints without a validation are not worse than others
        keep = {int((root / TRACKER).read_text())} | {iteration_of(path) for path in complete[: self._last or 0]}
        keep |= set(ranked[: self._best or 0])
        for path in complete:
            # Checkpoints newer than the tracker belong to a run that was set back, and stay.
            if iteration_of(path) not in keep and iteration_of(path) < max(keep):
                yield path


def _check_free_space(root: Path, iteration: int) -> None:
    """Create the directory of a checkpoint, and check that the disk has room for as many bytes as the one before."""
    (root / f"iter_{iteration:07d}").mkdir(parents=True, exist_ok=True)
    needed = max((manifest.num_bytes(path) for path in saved_iterations(root)[:2]), default=0)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise SaveFailed(f"{root} has {free / 1e9:.3g} GB free; the checkpoint before took {needed / 1e9:.3g} GB")


def _remove_partial_files(root: Path, iteration: int | None) -> None:
    """Remove the files of a failed save, whose space the next save needs. None: any asynchronous save."""
    atomic_checkpoint.clear_away(root, "" if iteration is None else f"iter_{iteration:07d}")
    for path in saved_iterations(root):
        if not any(path.iterdir()):
            path.rmdir()


def _reason(error: BaseException, saves: AtomicCheckpoints) -> str:
    """Return the message of the first failed rank, instead of torch's tracebacks of all ranks."""
    if not isinstance(error, CheckpointException):
        return str(error).rstrip(".")
    messages = {rank: str(failure[0]) for rank, failure in error.failures.items()}
    rank = min(messages, default=None)
    if not messages:
        return "the writer of another rank failed; see the message of the first rank"
    # torch's message does not give the cause, so the free space is added.
    return f"rank {rank}: {messages[rank]} (disk: {saves.free_after_writing / 1e6:.3g} MB were free then)"
