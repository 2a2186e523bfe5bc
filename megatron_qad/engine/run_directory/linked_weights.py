"""Adds weights of one checkpoint to another without reading or copying them: hard links, and one merged index.

A torch_dist checkpoint consists of files of tensors and an index, ``.metadata``, that names the file, offset and length
of every tensor. Files are never changed after they were written, so that two checkpoints can share them.
"""

import os
import pickle
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest

_INDEX = ".metadata"
_PREFIX = "weights"


def has_linked_weights(directory: Path) -> bool:
    """Whether a checkpoint shares tensors that another one has written, in the form in which that one stores them."""
    return any(directory.glob(f"{_PREFIX}*__*"))


@dataclass(frozen=True)
class LinkedWeights:
    """Tensors of a verified checkpoint that another checkpoint shares.

    Args:
        directory: an iteration of a checkpoint.
        names: names of the tensors in its index.
    """

    directory: Path
    names: Collection[str]

    def add_to(self, target: Path) -> dict[str, manifest.Sum]:
        """Add the tensors to the complete torch_dist checkpoint ``target``. Returns the sums of the added files.

        Files on another file system are copied.

        Raises:
            QADError: a tensor is missing or exists in both checkpoints, or a copied file is damaged.
            OSError: a link or a copy failed.
        """
        weights, state, names = _read_index(self.directory), _read_index(target), set(self.names)
        if missing := names - weights.state_dict_metadata.keys():
            raise QADError(f"{self.directory}: no tensor {min(missing)!r}.")
        if common := names & state.state_dict_metadata.keys():
            raise QADError(f"{target}: already has a tensor {min(common)!r}.")
        stored = {index: info for index, info in weights.storage_data.items() if index.fqn in names}
        renamed = _new_names(target, {info.relative_path for info in stored.values()})
        known = manifest.read(self.directory)
        sums = {new: _link(self.directory / old, target / new, known[old][1]) for old, new in renamed.items()}
        merged = Metadata(
            state_dict_metadata=state.state_dict_metadata | {name: weights.state_dict_metadata[name] for name in names},
            planner_data=_merge(state.planner_data, weights.planner_data, names),
            storage_data=state.storage_data
            | {index: replace(info, relative_path=renamed[info.relative_path]) for index, info in stored.items()},
            storage_meta=state.storage_meta,
            version=state.version,
        )
        aside = target / f"{_INDEX}.new"
        with open(aside, "wb") as stream:
            pickle.dump(merged, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, target / _INDEX)
        return sums


def _read_index(directory: Path) -> Metadata:
    return FileSystemReader(directory).read_metadata()


def _new_names(target: Path, files: Collection[str]) -> dict[str, str]:
    """Return new names in ``target`` for files: ``weights__0_0.distcp``, or ``weights1__0_0.distcp`` if that exists."""
    prefix = next(p for p in map(f"{_PREFIX}{{}}".format, chain([""], count(1))) if not any(target.glob(f"{p}__*")))
    return {file: f"{prefix}{file}" for file in sorted(files)}


def _merge(planned: dict | None, weights: dict | None, names: Collection[str]) -> dict | None:
    if planned is None or weights is None:
        return planned
    return planned | {name: weights[name] for name in names if name in weights}


def _link(source: Path, target: Path, digest: str) -> manifest.Sum:
    """Make ``target`` a link or a copy of ``source``, whose SHA-256 is known."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
        if (copied := manifest.sum_of(target))[1] != digest:
            raise QADError(f"{target}: differs from {source}, of which it is a copy. Check the disk.") from None
        return copied
    return target.stat().st_size, digest
