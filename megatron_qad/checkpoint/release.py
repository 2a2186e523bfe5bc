"""Writes a checkpoint that no training made: ``release/`` in torch_dist format, whole or not at all."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.megatron_fixes import save_checkpoints_in_this_process
from megatron_qad.engine.run_directory import atomic_checkpoint, locks, manifest
from megatron_qad.engine.run_directory.run_files import TRACKER


def write_release(target: Path, sharded: dict, finish: Callable[[Path], None]) -> None:
    """Save the sharded tensors of all ranks under ``target``. Every rank calls this.

    Args:
        target: a directory that is new or empty (``hf_writer.new_directory``).
        sharded: a sharded state dict, each rank its part.
        finish: called on the first rank with the directory, under the name that it has until it is whole, to write
            what stands beside the weights.

    Raises:
        QADError: a full disk or another problem of writing; nothing is left.
    """
    aside = target.parent / f".{target.name}.partial"  # renamed when whole: one that is killed leaves no target
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(aside, ignore_errors=True)
    torch.distributed.barrier()
    save_checkpoints_in_this_process()
    atomic_checkpoint.AtomicCheckpoints().install()

    def describe() -> None:
        finish(aside)
        manifest.seal(aside / "hf")
        manifest.write_atomically(aside / TRACKER, "release")

    try:
        dist_checkpointing.save(sharded, str(aside / "release"))
        atomic_checkpoint.on_first_rank(describe)
    except (atomic_checkpoint.SaveFailed, CheckpointException) as error:
        free = shutil.disk_usage(target.parent).free
        torch.distributed.barrier()
        if is_first:
            shutil.rmtree(aside, ignore_errors=True)
        reason = str(error) if isinstance(error, QADError) else "a rank could not write its files"
        raise QADError(
            f"{target}: not written: {reason} ({free / 1e9:.3g} GB are free there). Nothing is left of it"
        ) from error
    if is_first:
        aside.rename(target)  # replaces an empty directory
    torch.distributed.barrier()


@contextmanager
def lock_output(output: str | Path) -> Iterator[None]:
    """Own ``output`` (``locks.writing``) inside the ``with``; what stops that on the first rank stops all."""
    with ExitStack() as stack:
        atomic_checkpoint.on_first_rank(lambda: stack.enter_context(locks.writing(output)))
        yield


def run_on_all_ranks(work: Callable):
    """``work()`` on every rank. What stops one stops all, with its message, before any of them has written."""
    result, problem = None, None
    try:
        result = work()
    except QADError as error:
        problem = str(error)
    problems: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    if first := next((found for found in problems if found), None):
        raise QADError(first)
    return result
