"""The environment of functions that read and write checkpoints inside of a process that does other work, too.

``init_runtime`` prepares a process of our own: on a machine without a GPU it replaces ``torch.cuda``. A notebook or a
script with transformers' Trainer must keep its ``torch.cuda``, and reading and writing files does not need another one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_qad.engine import megatron_warnings
from megatron_qad.engine.distributed import init_process_group
from megatron_qad.engine.run_directory import restricted_unpickling


@contextmanager
def file_runtime(*, reads_torch_dist: bool = False) -> Iterator[None]:
    """Context manager in which ``import_hf`` and ``export_hf`` can run.

    It provides a process group: the existing one, torchrun's, or one of this process alone. A group that it has made
    ends with the block.

    Args:
        reads_torch_dist: whether a checkpoint of Megatron is read. Unpickling is then restricted in this process until
            it ends (``restricted_unpickling``).
    """
    if reads_torch_dist:
        restricted_unpickling.restrict_unpickling()
    megatron_warnings.hide()
    exists = torch.distributed.is_initialized()
    init_process_group()
    try:
        yield
    finally:
        if not exists:
            torch.distributed.destroy_process_group()
