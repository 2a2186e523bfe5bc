"""Restricted unpickling, so that reading a checkpoint runs no code from it.

torch's distributed checkpoints unpickle in two places: ``.metadata``, with pickle itself, and non-tensor objects, with
``torch.load(weights_only=False)``. The path may contain a file from an untrusted source. So the first accepts only the
classes that a checkpoint consists of, and the second becomes ``weights_only``, whose list of classes Megatron extends.
"""

import os
import pickle
import types
from typing import IO

import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.patches import replace

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    *(("torch", str(value).removeprefix("torch.")) for value in vars(torch).values() if isinstance(value, torch.dtype)),
}


def restrict_unpickling() -> None:
    """Restrict unpickling of checkpoints in this process until it ends. Idempotent."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    restricted = types.SimpleNamespace(dump=pickle.dump, load=lambda file: _Unpickler(file).load())
    replace("torch.distributed.checkpoint.filesystem:pickle", lambda _: restricted)
    # In checkpoints of earlier versions Megatron's arguments contain our options, under the module's name of that time.
    # They are plain values, so any namespace works.
    torch.serialization.add_safe_globals([(types.SimpleNamespace, "megatron_qad.config.options.QADOptions")])


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self._name = getattr(file, "name", "checkpoint metadata")

    def find_class(self, module: str, name: str):
        if (module, name) not in _CLASSES:
            raise QADError(
                f"{self._name} asks for {module}.{name}, which does not belong in a checkpoint and could run code. Use "
                "only checkpoints that tools/import_hf.py or pretrain_qad.py wrote."
            )
        return super().find_class(module, name)
