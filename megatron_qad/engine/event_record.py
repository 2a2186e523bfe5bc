"""Records names, sizes and SHA-256 of a job's TensorBoard event files at each checkpoint.

Event files only grow, so a later reader can tell a removed, truncated or changed file from one whose job was killed
while writing. The record is stored in every checkpoint (``event_files.json``) and, after a normal end of the job, in
the run directory. ``report.event_files`` checks it.
"""

import hashlib
import json
import os
from pathlib import Path

from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.run_files import EVENTS_FILE


def event_files(directory: Path) -> list[Path]:
    """Return the event files of a directory, sorted by name; none if it cannot be read."""
    return sorted(directory.glob("events.out.tfevents.*"))


class EventRecord:
    """Hashes event files incrementally: each call reads only the bytes added since the last one.

    Args:
        directory: ``--tensorboard-dir``.
        save: ``--save``. The record stores ``directory`` relative to it, so that a run can be moved.
    """

    def __init__(self, directory: Path, save: Path):
        self._directory, self._save = directory, save
        self._hashed: dict[str, tuple[int, hashlib._Hash]] = {}

    def text(self) -> str:
        """Return JSON: "directory", and "files": name -> "bytes" and the "sha256" of that many first bytes."""
        files = {}
        for file in event_files(self._directory):
            try:
                num_bytes, digest = self._hash_new_bytes(file)
            except OSError as error:
                print(f"megatron_qad: ERROR: {file} is left out of {EVENTS_FILE}: {error}.", flush=True)
                continue
            files[file.name] = {"bytes": num_bytes, "sha256": digest.hexdigest()}
        directory = os.path.relpath(self._directory.resolve(), self._save.resolve())
        return json.dumps({"directory": directory, "files": files}, indent=1)

    def _hash_new_bytes(self, file: Path) -> tuple[int, "hashlib._Hash"]:
        num_bytes, digest = self._hashed.get(file.name, (0, hashlib.sha256()))
        manifest.sync(file)  # a checkpoint survives a power failure, so the files that its record lists must too
        with open(file, "rb") as stream:
            stream.seek(num_bytes)
            while piece := stream.read(1 << 20):
                digest.update(piece)
                num_bytes += len(piece)
        self._hashed[file.name] = num_bytes, digest
        return num_bytes, digest
