"""Errors of the machine are one line, also in the classes in which libraries report them."""

import errno
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
from traceback import StackSummary

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qad.engine import QADError, entry_point
from megatron_qad.engine.run_directory import locks
from megatron_qad.engine.system_errors import explain


def error_of(work) -> BaseException:
    with pytest.raises(BaseException) as raised:
        work()
    return raised.value


@pytest.fixture
def small_files():
    """Files may have at most 8 KiB: a write beyond fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_failed_writes(tmp_path, small_files):
    tensors, reason = {"a": torch.ones(1 << 16)}, "The limit of file sizes is reached (ulimit -f)"
    assert f"File too large. {reason}" in explain(error_of(lambda: (tmp_path / "a").write_bytes(bytes(1 << 16))))
    assert f"File too large. {reason}" in explain(error_of(lambda: save_file(tensors, tmp_path / "a")))
    assert "could not be written. The disk may be full" in explain(
        error_of(lambda: torch.save(tensors, tmp_path / "a"))
    )


def test_directory_that_cannot_be_written():
    assert explain(error_of(lambda: save_file({}, "/proc/no/file"))).startswith("No such file or directory")
    assert "could not be written" in explain(error_of(lambda: torch.save({}, "/proc/file")))


def test_memory():
    for size in (1 << 44, 1 << 60):
        message = explain(error_of(lambda size=size: torch.empty(size, dtype=torch.int8).fill_(1)))
        assert message.startswith("out of memory. Free memory")
    assert "out of memory" in explain(error_of(lambda: bytes(1 << 60)))


def test_errors_of_several_ranks_are_one():
    def wrapped(*errors: BaseException) -> CheckpointException:
        return CheckpointException("read", {rank: (error, StackSummary()) for rank, error in enumerate(errors)})

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/__1_0.distcp")
    line = "/out/__1_0.distcp: No space left on device. The disk is full: free space or choose another disk."
    assert explain(wrapped(full, QADError("no."))) == explain(wrapped(wrapped(full))) == line
    assert explain(wrapped(full, KeyError("a bug"))) is None and explain(wrapped()) is None


@pytest.mark.parametrize(
    "bug", [ValueError("x"), RuntimeError("shapes differ"), KeyError(3), pickle.UnpicklingError("x")]
)
def test_bugs_are_not_explained(bug):
    assert explain(bug) is None


def _rank(rank: int, directory: str) -> None:
    sys.stderr = open(f"{directory}/stderr{rank}", "w", buffering=1)
    store = torch.distributed.FileStore(f"{directory}/store", 2)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=store)
    torch.distributed.barrier()

    def main():
        if rank == 1:
            raise QADError("the reason.")
        torch.distributed.all_reduce(torch.ones(3))

    entry_point.run(main)


def test_rank_that_waits_for_a_failed_one(tmp_path):
    """It gets an error of its connection; only the failed rank knows the reason."""
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the process group of another test file
    ranks = [spawn.Process(target=_rank, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert (tmp_path / "stderr1").read_text() == "error: the reason.\n"
    line = "error: the connection to another rank was lost. That rank has probably failed; see its error.\n"
    assert (tmp_path / "stderr0").read_text() == line


def _as_nobody(directory: str, result) -> None:
    os.setgroups([])
    os.setuid(65534)
    try:
        with locks.lock_output(f"{directory}/out"):
            pass
    except QADError as error:
        result.put(str(error))
    try:
        open(f"{directory}/secret")
    except OSError as error:
        result.put(explain(error))


def test_missing_permission(tmp_path):
    """Root may do everything, so the process becomes another user."""
    if os.getuid():
        pytest.skip("becoming another user needs root")
    fork = multiprocessing.get_context("fork")
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:  # under pytest-xdist there is one more
        parent.chmod(0o755)
    result = fork.SimpleQueue()
    process = fork.Process(target=_as_nobody, args=(str(tmp_path), result))
    process.start()
    process.join(20)
    assert f"--output {tmp_path}/out: cannot be written (Permission denied: {tmp_path}/.out.lock). Ch" in result.get()
    assert result.get() == f"{tmp_path}/secret: Permission denied. Change the permissions or choose another path."


def test_limit_of_address_space():
    command = "ulimit -v 2000000; exec python -c 'import megatron_qad'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the limit of address space is 2.05 GB (ulimit -v); torch and Megatron alone")
    assert done.stderr.count("\n") == 1
