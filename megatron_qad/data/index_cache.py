"""Cache of the arrays that cut data into samples, which a damaged cache or a full disk cannot harm.

The files have the names and the format of Megatron's own cache, plus a record of their SHA-256. Megatron reads whatever
a cached file contains, trains on it, and fails if it cannot write. Here a file that does not match its record is built
again, and arrays that cannot be written stay in memory.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from megatron.training import print_rank_0

from megatron_qad.engine.entry_point import describe
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest

Arrays = tuple[np.ndarray, ...]


class IndexCache:
    """The cached arrays of one dataset.

    Args:
        base: path and start of the file names: ``DIRECTORY/HASH-CLASS-SPLIT``.
        names: name of each array, such as ``document_index``.
        description: text that says what the arrays were built from.
        unwritable: directories in which writing has failed, shared by all caches of a job; each is reported once.
    """

    def __init__(self, base: Path, names: Sequence[str], description: str, unwritable: set[Path]):
        self._base, self._description, self._unwritable = base, description, unwritable
        self._files = [self._file(f"{name}.npy") for name in names]
        self._record = self._file("sums.json")

    def load_or_build(self, build: Callable[[], Arrays], writes: bool) -> Arrays:
        """Return the cached arrays if their files are whole, or else those that ``build`` returns.

        Args:
            writes: whether this process, one of all ranks, stores what it has built.
        """
        if os.path.exists(self._record):  # False also if the directory may not be read
            try:
                return self.load()
            except QADError as error:
                print_rank_0(f"megatron_qad: index cache: {error}. It is built again.")
        arrays = build()
        if writes and self._base.parent not in self._unwritable:
            try:
                self._store(arrays)
            except OSError as error:
                self._unwritable.add(self._base.parent)
                print_rank_0(
                    f"megatron_qad: index cache {self._base.parent}: cannot be written ({describe(error)}) Every rank "
                    "keeps the indices in memory. Give a writable --data-cache-path to store them."
                )
        return arrays

    def load(self) -> Arrays:
        """Return the cached arrays, memory-mapped.

        Raises:
            QADError: a file is missing, unreadable or damaged.
        """
        sums = json_records.read(self._record)
        for file in self._files:
            try:
                actual = manifest.sum_of(file)[1]
            except OSError as error:
                raise QADError(f"{file}: cannot be read ({error.strerror})") from error
            if actual != sums.get(file.name):
                raise QADError(f"{file}: is damaged (it has a different SHA-256 from when it was written)")
        try:
            return tuple(np.load(file, mmap_mode="r", allow_pickle=False) for file in self._files)
        except (OSError, ValueError) as error:
            raise QADError(f"{self._base}: cannot be read ({error})") from error

    def _store(self, arrays: Arrays) -> None:
        """Write all files, the record last. Jobs that do this at the same time write the same bytes."""
        self._base.parent.mkdir(parents=True, exist_ok=True)
        self._record.unlink(missing_ok=True)
        replace_file(self._file("description.txt"), lambda stream: stream.write(self._description.encode()))
        for file, array in zip(self._files, arrays, strict=True):
            replace_file(file, lambda stream, array=array: np.save(stream, array, allow_pickle=False))
        sums = {file.name: manifest.sum_of(file)[1] for file in self._files}
        text = json_records.to_text(self._record.name, sums)
        replace_file(self._record, lambda stream: stream.write(text.encode()))

    def _file(self, name: str) -> Path:
        return self._base.with_name(f"{self._base.name}-{name}")


def replace_file(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replace a file atomically by what ``write`` writes; several threads, processes and hosts may do so at once.

    Raises:
        OSError: it could not be written; the old file, if any, is unchanged.
    """
    aside = file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(aside, "wb") as stream:
            write(stream)
        os.replace(aside, file)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
