"""A failed write does not crash the process later. tests/dist/test_checkpoints.py tests complete saves."""

import gc
import io
import multiprocessing
import queue
from functools import partial

from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from megatron_qad.engine import init_runtime
from megatron_qad.engine.run_directory import atomic_checkpoint

init_runtime()


def write_object_to_full_disk(directory: str) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    upstream = FileSystemWriterAsync.write_preloaded_data_multithread
    write = partial(upstream, [_StorageWriterTransforms()], False)
    item = WriteItem(index=MetadataIndex("object"), type=WriteItemType.BYTE_IO)
    buckets = [("/dev/full", "key", ([(item, io.BytesIO(bytes(1 << 20)))], []))]
    results = queue.Queue()
    atomic_checkpoint._write_and_hash(write, directory, 0, 0, buckets, results)
    assert "OSError" in str(results.get())
    del buckets
    gc.collect()


def test_garbage_of_failed_write_is_collected(tmp_path):
    """CPython 3.12.0 and 3.12.1 would die by signal 11."""
    process = multiprocessing.get_context("fork").Process(target=write_object_to_full_disk, args=[str(tmp_path)])
    process.start()
    process.join()
    assert process.exitcode == 0
