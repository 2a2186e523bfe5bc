"""Atomic checkpoints: a checkpoint becomes visible only when it is complete.

``AtomicCheckpoints.install`` replaces Megatron's ``dist_checkpointing.save``, the one function that writes every
torch_dist checkpoint, synchronous or not. The replacement writes to ``NAME.JOB.partial``, hashes every file in the
process that wrote it, and renames the directory when it is complete; only then does Megatron update
``latest_checkpointed_iteration.txt``. A failure on one rank is raised on all, so that a full disk ends a save and not
the job (``training.callbacks.checkpoint_keeper`` handles the error)."""

import io
import json
import multiprocessing
import os
import re
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.patches import replace
from megatron_qad.engine.processes import end_with_parent
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.linked_weights import LinkedWeights
from megatron_qad.engine.system_errors import describe, explain

PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed"
"""Suffixes of a checkpoint that is being written, was replaced by a newer one, or is being removed."""
_LEFTOVER = re.compile(r"(iter_\d{7,}|release)(\.[0-9a-f]{8}(\.room)?\.partial|\.replaced|\.removed)")
"""Names that saves and removals leave behind, and that no user would choose."""
_RESERVED_BYTES = 16 << 20
_SUMS = ".sums."


class SaveFailed(QADError):
    """A checkpoint could not be written or was incomplete; raised on every rank."""


class AtomicCheckpoints:
    """Writes the checkpoints of one job atomically."""

    def __init__(self):
        self.extra_texts: dict[str, Callable[[], str | None]] = {}
        """Text files to add to every checkpoint: name -> function that rank 0 calls at each save for the content; it
        returns None to leave the file out."""
        self.weights: LinkedWeights | None = None
        """Tensors of another checkpoint that every checkpoint contains as links, besides those that are saved."""
        self.free_after_writing = 0
        """Free bytes on the disk after the last save wrote its large files, on rank 0; used in the message if the save
        failed."""
        self._job_name: str | None = None

    def install(self) -> None:
        """Make Megatron save through this object."""
        replace("megatron.core.dist_checkpointing:save", lambda upstream: partial(self.save, upstream))

    def save(
        self,
        upstream: Callable,
        sharded_state_dict,
        checkpoint_dir,
        *args,
        async_sharded_save: bool = False,
        async_strategy: str = "mcore",
        verify_integrity: bool = False,
        **kwargs,
    ):
        """Megatron's ``save`` with the same arguments and return value (a request, if asynchronous).

        ``verify_integrity`` has no effect: checksums are always written.

        Raises:
            SaveFailed: on every rank.
        """
        final = Path(checkpoint_dir)
        aside = final.with_name(f"{final.name}.{self._get_job_name()}{PARTIAL}")
        on_first_rank(lambda: _start(aside, final))
        is_first = torch.distributed.get_rank() == 0
        texts = {n: content for n, text in self.extra_texts.items() if is_first and (content := text()) is not None}
        request = upstream(
            sharded_state_dict,
            str(aside),
            *args,
            async_sharded_save=True,  # also for a synchronous save, so that its steps can be run below
            async_strategy=async_strategy if async_sharded_save else "mcore",
            **kwargs,
        )
        if request.async_fn is not None:
            write = partial(_write_and_hash, request.async_fn, str(aside), torch.distributed.get_rank())
            request = request._replace(async_fn=write)
        request.finalize_fns.insert(0, partial(self._release_reserve, aside))
        request.finalize_fns.append(partial(_publish, aside, final, texts, self.weights))
        if async_sharded_save:
            return request
        request.execute_sync()
        return None

    def _get_job_name(self) -> str:
        """Return a random name for this job, so that another job never writes to the directory of a writer process that
        outlived a killed job."""
        if self._job_name is None:
            name = [secrets.token_hex(4)]
            torch.distributed.broadcast_object_list(name, src=0)
            self._job_name = name[0]
        return self._job_name

    def _release_reserve(self, aside: Path) -> None:
        if torch.distributed.get_rank() == 0:
            self.free_after_writing = shutil.disk_usage(aside).free
            _reserve_file(aside).unlink(missing_ok=True)


def _start(aside: Path, final: Path) -> None:
    if final.is_dir() and not any(final.iterdir()):
        final.rmdir()  # Megatron has just created it; the name must not be visible yet
    clear_away(final.parent, f"{final.name}.")
    aside.mkdir(parents=True)
    # Space for the small files that rank 0 writes last and alone, when a full disk could no longer fail on every rank.
    with open(_reserve_file(aside), "wb") as reserve:
        os.posix_fallocate(reserve.fileno(), 0, _RESERVED_BYTES)


def _reserve_file(aside: Path) -> Path:
    return aside.with_name(f"{aside.name.removesuffix(PARTIAL)}.room{PARTIAL}")


def clear_away(root: Path, name: str = "") -> None:
    """Remove leftovers in ``root`` of failed or killed saves whose name starts with ``name``."""
    for path in [path for path in root.glob(f"{name}*") if _LEFTOVER.fullmatch(path.name)]:
        final = path.with_name(path.name.removesuffix(REPLACED))
        if path.name.endswith(REPLACED) and not final.exists():
            path.rename(final)  # the replacement was not yet renamed to it
        elif path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


class _Bytes(io.BytesIO):
    """A BytesIO whose buffer view may safely be garbage-collected.

    A failed write leaves its frames, and the view in them, in a reference cycle. CPython 3.12.0 and 3.12.1 die by
    signal 11 when they collect a view of a BytesIO there (python/cpython#111049), but not with a view of bytes.
    """

    def getbuffer(self) -> memoryview:
        return memoryview(self.getvalue())


def _write_and_hash(write: Callable, directory: str, rank: int, *args, **kwargs) -> None:
    """Write a rank's part of the save and hash its files in the same process, so that training does not wait."""
    if multiprocessing.parent_process() is not None:  # asynchronous: without the parent nobody publishes the files
        end_with_parent()
    for _, _, (objects, _) in args[1]:  # (file, key, (pickled objects, tensors)), each a list of (item, data)
        objects[:] = [(item, _Bytes(data.getvalue())) for item, data in objects]
    write(*args, **kwargs)  # reports its own errors through a queue
    try:
        files = Path(directory).glob(f"__{rank}_*.distcp")
        (Path(directory) / f"{_SUMS}{rank}").write_text(json.dumps({f.name: manifest.sum_of(f) for f in files}))
    except OSError as error:
        print(f"megatron_qad: rank {rank}: {error}", flush=True)  # _publish then fails for lack of the sums


def _publish(aside: Path, final: Path, texts: dict[str, str], weights: LinkedWeights | None) -> None:
    """Gather the sums of all ranks, check that the files are complete, and rename the checkpoint to its final name."""
    shares: list[dict] = [{} for _ in range(torch.distributed.get_world_size())]
    file = aside / f"{_SUMS}{torch.distributed.get_rank()}"
    try:
        local_sums = json.loads(file.read_text()) if file.is_file() else {}
        file.unlink(missing_ok=True)
    except (OSError, ValueError):
        local_sums = {}
    torch.distributed.all_gather_object(shares, local_sums)
    sums = {name: tuple(value) for share in shares for name, value in share.items()}
    on_first_rank(lambda: _check_and_rename(sums, texts, aside, final, weights))


def _check_and_rename(
    sums: dict[str, manifest.Sum], texts: dict[str, str], aside: Path, final: Path, weights: LinkedWeights | None
) -> None:
    if weights is not None:
        sums |= weights.add_to(aside)
    for name, text in texts.items():
        manifest.write_atomically(aside / name, text)
    for name in (".metadata", "metadata.json", *texts):
        sums[name] = manifest.sum_of(aside / name)
    if mismatch := {file.name for file in aside.iterdir() if not file.name.startswith(_SUMS)} ^ sums.keys():
        raise SaveFailed(f"{aside}: {min(mismatch)} has no checksum, or is missing")
    manifest.write_sums(aside, sums)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        os.rename(final, replaced)
    os.rename(aside, final)
    manifest.sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def on_first_rank(work: Callable[[], None]) -> None:
    """Run ``work`` on rank 0; its error is raised as SaveFailed on every rank if ``explain`` knows it."""
    problem: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            work()
        except OSError as error:
            problem = [describe(error, with_advice=False)]
        except Exception as error:
            problem = [explain(error)]
            if problem == [None]:
                raise
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise SaveFailed(problem[0])
