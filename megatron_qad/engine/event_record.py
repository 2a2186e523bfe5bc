"""What the TensorBoard event files of a job are at a checkpoint: names, sizes, SHA-256.

Event files only grow, so that a later reader knows a file that was removed, cut or changed from one whose job was
killed while it wrote. The record is a text in every checkpoint (``event_files.json``) and, when a job ends in order,
beside them; ``report.event_files`` checks it.
"""

import hashlib
import json
import os
from pathlib import Path

from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.run_files import EVENTS_FILE


def event_files(directory: Path) -> list[Path]:
    """The event files of a directory by name; none where it cannot be read."""
    return sorted(directory.glob("events.out.tfevents.*"))


class EventRecord:
    """Hashes what the event files of ``directory`` grew by since it was asked last.

    Args:
        directory: ``--tensorboard-dir``.
        save: ``--save``, to which the record names the directory, so that a run may be moved.
    """

    def __init__(self, directory: Path, save: Path):
        self._directory, self._save = directory, save
        self._hashed: dict[str, tuple[int, hashlib._Hash]] = {}

    def text(self) -> str:
        """JSON: "directory", and "files": name -> "bytes" and the "sha256" of that many first bytes."""
        files = {}
        for file in event_files(self._directory):
            try:
                num_bytes, digest = self._grown(file)
            except OSError as error:
                print(f"megatron_qad: ERROR: {file} is left out of {EVENTS_FILE}: {error}", flush=True)
                continue
            files[file.name] = {"bytes": num_bytes, "sha256": digest.hexdigest()}
        directory = os.path.relpath(self._directory.resolve(), self._save.resolve())
        return json.dumps({"directory": directory, "files": files}, indent=1)

    def _grown(self, file: Path) -> tuple[int, "hashlib._Hash"]:
        num_bytes, digest = self._hashed.get(file.name, (0, hashlib.sha256()))
        manifest.sync(file)  # a checkpoint outlives a power failure: so must what it says of other files
        with open(file, "rb") as stream:
            stream.seek(num_bytes)
            while piece := stream.read(1 << 20):
                digest.update(piece)
                num_bytes += len(piece)
        self._hashed[file.name] = num_bytes, digest
        return num_bytes, digest
