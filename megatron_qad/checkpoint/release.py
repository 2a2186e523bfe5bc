"""Write a checkpoint outside training: ``release/`` in torch_dist format, atomically."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.megatron_fixes import save_checkpoints_in_this_process
from megatron_qad.engine.run_directory import atomic_checkpoint, locks, manifest, new_files
from megatron_qad.engine.run_directory.run_files import TRACKER
from megatron_qad.engine.system_errors import explain


def write_release(target: Path, sharded: dict, finish: Callable[[Path], None]) -> None:
    """Save the sharded tensors of all ranks to ``target``. Every rank calls this.

    Args:
        target: a new or empty directory (``hf_writer.new_directory``).
        sharded: sharded state dict with the part of this rank.
        finish: called on the first rank with the temporary directory, to write the files next to the weights.

    Raises:
        QADError: a full disk or another write error; nothing is left behind.
    """
    aside = target.parent / f".{target.name}.partial"  # renamed when complete, so a killed process leaves no target
    is_first = torch.distributed.get_rank() == 0
    atomic_checkpoint.on_first_rank(lambda: new_files.make_new_directory(aside))
    save_checkpoints_in_this_process()
    atomic_checkpoint.AtomicCheckpoints().install()

    def write_description() -> None:
        finish(aside)
        manifest.write_manifest(aside / "hf")
        manifest.write_atomically(aside / TRACKER, "release")

    try:
        dist_checkpointing.save(sharded, str(aside / "release"))
        atomic_checkpoint.on_first_rank(write_description)
    except (atomic_checkpoint.SaveFailed, CheckpointException) as error:
        free = shutil.disk_usage(target.parent).free
        torch.distributed.barrier()
        if is_first:
            shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).rstrip(".") if isinstance(error, QADError) else "a rank could not write its files"
        raise QADError(
            f"{target}: not written: {reason} ({free / 1e9:.3g} GB are free there). Free space, or choose another "
            "directory."
        ) from error
    if is_first:
        aside.rename(target)  # replaces an empty directory
    torch.distributed.barrier()


@contextmanager
def lock_output(output: str | Path) -> Iterator[None]:
    """Hold the write lock of ``output`` on the first rank; an error there is raised on all ranks."""
    with ExitStack() as stack:
        atomic_checkpoint.on_first_rank(lambda: stack.enter_context(locks.lock_output(output)))
        yield


def run_on_all_ranks(work: Callable):
    """Return ``work()`` of this rank; an error of any rank that ``explain`` knows is raised on all as a QADError."""
    result, message = None, None
    try:
        result = work()
    except Exception as error:
        if (message := explain(error)) is None:
            raise
    messages: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, message)
    if first := next((message for message in messages if message), None):
        raise QADError(first)
    return result
