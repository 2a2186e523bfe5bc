"""Checkpoints that are complete or invisible.

``AtomicCheckpoints.install`` replaces Megatron's ``dist_checkpointing.save``, the one function through which every
torch_dist checkpoint is written, synchronous or not. Ours writes to ``NAME.JOB.partial``, sums up every file where it
was written, and renames the directory when all of it is there; only then does Megatron move
``latest_checkpointed_iteration.txt``. What fails on one rank fails on all, so that a full disk ends a save and not a
job (``training.callbacks.checkpoint_keeper`` goes on with it)."""

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

PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed"
"""Endings of a checkpoint that is being written, that has a successor, or that is being removed."""
_OURS = re.compile(r"(iter_\d{7,}|release)(\.[0-9a-f]{8}(\.room)?\.partial|\.replaced|\.removed)")
"""Names that saves and removals leave behind, and that no user would choose."""
_ROOM_BYTES = 16 << 20
_SUMS = ".sums."


class SaveFailed(QADError):
    """A checkpoint could not be written or was not whole; raised on every rank."""


class AtomicCheckpoints:
    """The saves of one job."""

    def __init__(self):
        self.extra_texts: dict[str, Callable[[], str | None]] = {}
        """Files of text that go into every checkpoint: name -> its content at the time of the save, asked on the first
        rank; None leaves it out."""
        self.free_after_writing = 0
        """Bytes left on the disk when the last save had written its large files, for the message if that failed; rank
        0's."""
        self._job_name: str | None = None

    def install(self) -> None:
        """Have Megatron save through this object."""
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
        **rest,
    ):
        """Megatron's ``save`` with the same arguments and the same answer (a request, if asynchronous).

        ``verify_integrity`` asks for what is done anyway.

        Raises:
            SaveFailed: on every rank.
        """
        final = Path(checkpoint_dir)
        aside = final.with_name(f"{final.name}.{self._name_of_this_job()}{PARTIAL}")
        on_first_rank(lambda: _start(aside, final))
        is_first = torch.distributed.get_rank() == 0
        texts = {n: content for n, text in self.extra_texts.items() if is_first and (content := text()) is not None}
        request = upstream(
            sharded_state_dict,
            str(aside),
            *args,
            async_sharded_save=True,  # also where it is not: the steps are then ours to run
            async_strategy=async_strategy if async_sharded_save else "mcore",
            **rest,
        )
        if request.async_fn is not None:
            write = partial(_write_and_sum, request.async_fn, str(aside), torch.distributed.get_rank())
            request = request._replace(async_fn=write)
        request.finalize_fns.insert(0, partial(self._free_room, aside))
        request.finalize_fns.append(partial(_publish, aside, final, texts))
        if async_sharded_save:
            return request
        request.execute_sync()
        return None

    def _name_of_this_job(self) -> str:
        """The writer of an asynchronous save may outlive a job that is killed: no other job shall write where it
        does."""
        if self._job_name is None:
            name = [secrets.token_hex(4)]
            torch.distributed.broadcast_object_list(name, src=0)
            self._job_name = name[0]
        return self._job_name

    def _free_room(self, aside: Path) -> None:
        if torch.distributed.get_rank() == 0:
            self.free_after_writing = shutil.disk_usage(aside).free
            _room(aside).unlink(missing_ok=True)


def _start(aside: Path, final: Path) -> None:
    if final.is_dir() and not any(final.iterdir()):
        final.rmdir()  # Megatron has just made it: nothing of that name is to be seen yet
    clear_away(final.parent, f"{final.name}.")
    aside.mkdir(parents=True)
    # Room for the small files that the first rank writes last and alone, where a full disk could not be agreed on.
    with open(_room(aside), "wb") as room:
        os.posix_fallocate(room.fileno(), 0, _ROOM_BYTES)


def _room(aside: Path) -> Path:
    return aside.with_name(f"{aside.name.removesuffix(PARTIAL)}.room{PARTIAL}")


def clear_away(root: Path, name: str = "") -> None:
    """Remove what saves of ``name`` (the start of one) left in ``root`` when they failed or were killed."""
    for path in [path for path in root.glob(f"{name}*") if _OURS.fullmatch(path.name)]:
        place = path.with_name(path.name.removesuffix(REPLACED))
        if path.name.endswith(REPLACED) and not place.exists():
            path.rename(place)  # its successor was not yet in its place
        elif path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


class _Bytes(io.BytesIO):
    """A BytesIO of which a view may become garbage.

    A write that fails leaves its frames, and the view in them, in a reference cycle. CPython 3.12.0 and 3.12.1 die by
    signal 11 when they collect a view of a BytesIO there (python/cpython#111049); a view of bytes they survive.
    """

    def getbuffer(self) -> memoryview:
        return memoryview(self.getvalue())


def _write_and_sum(write: Callable, directory: str, rank: int, *args, **kwargs) -> None:
    """A rank's part of the save, in the process that writes it: what it wrote is summed up there, not in training."""
    if multiprocessing.parent_process() is not None:  # of an asynchronous save, and nobody would publish what it wrote
        end_with_parent()
    for _, _, (objects, _) in args[1]:  # (file, key, (pickled objects, tensors)), each a list of (item, data)
        objects[:] = [(item, _Bytes(data.getvalue())) for item, data in objects]
    write(*args, **kwargs)  # hands its own errors over a queue
    try:
        files = Path(directory).glob(f"__{rank}_*.distcp")
        (Path(directory) / f"{_SUMS}{rank}").write_text(json.dumps({f.name: manifest.sum_of(f) for f in files}))
    except OSError as error:
        print(f"megatron_qad: rank {rank}: {error}", flush=True)  # _publish misses the sums


def _publish(aside: Path, final: Path, texts: dict[str, str]) -> None:
    """All ranks: put the sums together, check that everything is there, and give the checkpoint its name."""
    shares: list[dict] = [{} for _ in range(torch.distributed.get_world_size())]
    mine = aside / f"{_SUMS}{torch.distributed.get_rank()}"
    try:
        found = json.loads(mine.read_text()) if mine.is_file() else {}
        mine.unlink(missing_ok=True)
    except (OSError, ValueError):
        found = {}
    torch.distributed.all_gather_object(shares, found)
    sums = {name: tuple(value) for share in shares for name, value in share.items()}
    on_first_rank(lambda: _check_and_rename(sums, texts, aside, final))


def _check_and_rename(sums: dict[str, manifest.Sum], texts: dict[str, str], aside: Path, final: Path) -> None:
    for name, text in texts.items():
        manifest.write_atomically(aside / name, text)
    for name in (".metadata", "metadata.json", *texts):
        sums[name] = manifest.sum_of(aside / name)
    if unsummed := {file.name for file in aside.iterdir() if not file.name.startswith(_SUMS)} ^ sums.keys():
        raise SaveFailed(f"{aside}: no checksum of {min(unsummed)}, or it is not there")
    manifest.write_sums(aside, sums)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        os.rename(final, replaced)
    os.rename(aside, final)
    manifest.sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def on_first_rank(work: Callable[[], None]) -> None:
    """Do ``work`` on rank 0; what stops it there is raised on every rank."""
    problem: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            work()
        except (OSError, QADError) as error:
            problem = [str(error)]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise SaveFailed(problem[0])
