"""The directory next to an output in which a conversion writes it, and which a restarted conversion continues.

It is named ``.NAME.partial``, belongs to the user and admits no one else. It has ``output/``, which is renamed to the
output at the end, and ``progress/`` with a record of each finished part: what it holds, its size and its SHA-256. A
conversion that finds the directory continues it if it would write the same output, and starts afresh otherwise. Records
are written after their part is on the disk, and parts are verified before they are used.
"""

import os
import shutil
import stat
from pathlib import Path
from typing import Any

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest, new_files

_OUTPUT, _PROGRESS, _JOB = "output", "progress", "job.json"


class PartialDirectory:
    """The partial directory of one output.

    Args:
        output: output directory, with links resolved.
        job: everything that determines the output, as JSON values.
    """

    def __init__(self, output: Path, job: dict[str, Any]):
        self.output, self._job = output, job
        self._root = output.parent / f".{output.name}.partial"
        self.path = self._root / _OUTPUT
        """The directory that becomes the output."""
        self._progress = self._root / _PROGRESS

    def open(self) -> None:
        """Create the directory, or keep the one of an earlier process. One process calls this.

        Raises:
            QADError: the directory cannot be removed, because another user owns it.
        """
        if self._can_continue():
            return
        self.remove()
        self._root.mkdir(mode=0o700)
        self.path.mkdir()
        self._progress.mkdir()
        json_records.write(self._progress / _JOB, self._job)

    def remove(self) -> None:
        """Remove the directory, or a file or link of its name. Does nothing if there is none."""
        try:
            new_files.remove(self._root)
        except OSError as error:
            raise QADError(
                f"{self._root}: cannot be removed ({error.strerror}). An earlier process left it, or it belongs to "
                "another user. Remove it, or choose another output."
            ) from error

    def finished(self, part: str) -> dict | None:
        """Return the record of a part, or None if it is not finished. Its file may still be damaged."""
        try:
            return json_records.read(self._progress / f"{part}.json")
        except QADError:
            return None

    def finish(self, part: str, record: dict) -> None:
        """Record that a part is finished. Its file must be on the disk."""
        json_records.write(self._progress / f"{part}.json", record)

    def publish(self) -> None:
        """Rename the complete output. One process calls this, after all have finished."""
        for path in (*self.path.rglob("*"), self.path):
            manifest.sync(path)
        os.rename(self.path, self.output)  # atomic; replaces an empty directory
        manifest.sync(self.output.parent)
        shutil.rmtree(self._root, ignore_errors=True)

    def _can_continue(self) -> bool:
        try:
            found = os.lstat(self._root)
            is_private = found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o077
            if not stat.S_ISDIR(found.st_mode) or not is_private:
                return False
            return self.path.is_dir() and json_records.read(self._progress / _JOB) == self._job
        except (OSError, QADError):
            return False
