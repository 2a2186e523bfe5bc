"""Restricted reading of torch_dist checkpoints: it runs no code from them, and opens no file outside of them.

torch's distributed checkpoints unpickle in two places: ``.metadata``, with pickle itself, and non-tensor objects, with
``torch.load(weights_only=False)``. The path may contain a file from an untrusted source. So the first accepts only the
classes that a checkpoint consists of, and the second becomes ``weights_only``, whose list of classes Megatron extends.
``.metadata`` also names the files of the tensors: they must be in its directory. The directory itself may be a link.
"""

import functools
import os
import pickle
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import StackSummary
from typing import IO, Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.patches import replace
from megatron_qad.engine.system_errors import explain

_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    # Megatron attaches the plans of all ranks. torch 2.12 writes them, 2.11 drops them.
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


_ADVICE = "Use only checkpoints that megatron-qad import or pretrain_qad.py wrote."
_REFUSED_CLASS = re.compile(r"GLOBAL (\S+)|but got (?:<class ')?([\w.]+)")
"""The class in a message of torch's weights_only unpickler."""


def restrict_unpickling() -> None:
    """Restrict the reading of checkpoints in this process until it ends. Idempotent.

    A file that asks for another class, is damaged, or is outside its checkpoint's directory raises QADError, which
    torch.distributed.checkpoint wraps in its CheckpointException (``one_error``).
    """
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    restricted = types.SimpleNamespace(dump=pickle.dump, load=_load_metadata)
    replace("torch.distributed.checkpoint.filesystem:pickle", lambda _: restricted)
    replace("torch.distributed.checkpoint.filesystem:FileSystem", _checked_file_system)
    replace("torch:load", _name_refused_class)
    # In checkpoints of earlier versions Megatron's arguments contain our options, under the module's name of that time.
    # They are plain values, so any namespace works.
    torch.serialization.add_safe_globals([(types.SimpleNamespace, "megatron_qad.config.options.QADOptions")])


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self._name = getattr(file, "name", "checkpoint metadata")

    def find_class(self, module: str, name: str):
        if (module, name) not in _CLASSES:
            raise _refusal(self._name, f"{module}.{name}")
        return super().find_class(module, name)


def _load_metadata(file: IO[bytes]) -> Metadata:
    """Return the content of ``.metadata``, whose files are all in its directory.

    Raises:
        CheckpointException: it is refused. Not QADError, because torch ignores every Exception here and then complains
            about a missing file.
    """
    name = getattr(file, "name", "checkpoint metadata")
    try:
        metadata = _Unpickler(file).load()
        paths = {storage.relative_path for storage in metadata.storage_data.values()}
        outside = sorted(path for path in paths if path in ("", ".", "..") or Path(path).name != path)
    except QADError as error:
        refusal = error
    except Exception as error:  # a damaged pickle raises almost anything
        reason = f"{type(error).__name__}: {error}"
        refusal = QADError(f"{name} is damaged, or is not the index of a checkpoint ({reason}). {_ADVICE}")
    else:
        if not outside:
            return metadata
        refusal = QADError(
            f"{name} names the file {outside[0]!r}, expected files in its own directory, without a path. {_ADVICE}"
        )
    raise _refused(str(refusal)) from refusal


def _refused(message: str) -> CheckpointException:
    return CheckpointException("refused", {0: (QADError(message), StackSummary())})


@contextmanager
def one_error() -> Iterator[None]:
    """Raise QADError instead of the CheckpointException in which torch wraps the errors of all ranks.

    Raises:
        QADError: the error of the first rank, if ``explain`` knows the errors of all.
    """
    try:
        yield
    except CheckpointException as error:
        if (message := explain(error)) is None:
            raise
        raise QADError(message) from error


def _checked_file_system(upstream: type) -> type:
    class FileSystem(upstream):
        """Opens no file outside of the checkpoint, and names a file with an object that is refused or damaged."""

        @contextmanager
        def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:
            path = Path(path)
            # Only the file itself is checked: the directory of a checkpoint may be a link.
            if mode == "rb" and path.is_symlink() and path.resolve().parent != path.parent.resolve():
                raise _refused(
                    f"{path} is a link that leads out of the checkpoint, to {os.readlink(path)}. Copy the file instead."
                )
            with super().create_stream(path, mode) as stream:
                try:
                    yield stream
                except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
                    raise _explained(path, error) from error

    return FileSystem


def _name_refused_class(upstream: Callable) -> Callable:
    """Return torch.load with errors that name the file and do not advise to run its code."""

    @functools.wraps(upstream)
    def load(f: Any, *args, **kwargs):
        try:
            return upstream(f, *args, **kwargs)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            name = f if isinstance(f, str | os.PathLike) else getattr(f, "name", None)
            if name is None:  # an object in a larger file, which create_stream names
                raise
            raise _explained(name, error) from error

    return load


def _explained(file: str | os.PathLike, error: Exception) -> Exception:
    """Return the QADError for an object that cannot be read; ``error`` itself if it has another reason."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        if match := _REFUSED_CLASS.search(text):
            return _refusal(file, match[1] or match[2])
        text = text.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    elif isinstance(error, RuntimeError) and "PytorchStreamReader" not in text:
        return error
    return QADError(f"{file} is damaged, or is not a file of a checkpoint ({text or 'it ends too early'}). {_ADVICE}")


def _refusal(file: str | os.PathLike, name: str) -> QADError:
    return QADError(f"{file} asks for {name}, which does not belong in a checkpoint and could run code. {_ADVICE}")
