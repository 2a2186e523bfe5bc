"""Runs independent tasks in worker processes with one thread each.

Conversions consist of short operations on tiles that fit into a core's cache. They do not scale with threads: tiles are
too small to be divided, and threads of one process wait for Python's lock between the operations. So every core gets a
process. Workers are forked, as those of PyTorch's DataLoader: they share the open files and the plan of their parent.
"""

import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context

import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.processes import end_with_parent

_work: Callable | None = None
"""The function of this worker process."""


def default_num_workers() -> int:
    """Return the number of cores for each rank of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def run[T, R](tasks: Iterable[T], work: Callable[[T], R], num_workers: int) -> Iterator[tuple[T, R]]:
    """Yield each task with ``work(task)``, in the order in which they are done.

    One worker, or one task, runs in this process. Tasks and results are pickled, ``work`` is not.

    Args:
        tasks: started in their order. The caller may add tasks to a deque at any time.

    Raises:
        QADError: a worker process was killed.
        Exception: what ``work`` raised first. Tasks that have started are finished before it is raised.
    """
    queue = tasks if isinstance(tasks, deque) else deque(tasks)
    if min(num_workers, len(queue)) <= 1:
        while queue:
            task = queue.popleft()
            with _one_thread():
                result = _run(work, task)
            yield task, result
        return
    pool = ProcessPoolExecutor(num_workers, get_context("fork"), _start_worker, (work, os.getpid()))
    futures: dict[Future, T] = {}
    try:
        while queue or futures:
            while queue and len(futures) < 2 * num_workers:  # few, so that an added task does not wait for all others
                task = queue.popleft()
                futures[_submit(pool, task)] = task
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                yield futures.pop(future), future.result()
    except BrokenProcessPool as error:
        raise QADError(
            "a worker process was killed, probably because memory ran out. Use fewer --num-workers, or more memory."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, task) -> Future:
    with warnings.catch_warnings():
        # Python warns of forks of processes with threads. Here these serve locks and gloo, which workers do not use.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pool.submit(_call, task)


def _start_worker(work: Callable, parent: int) -> None:
    global _work
    _work = work
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    torch.set_num_threads(1)


def _call(task):
    return _run(_work, task)


def _run(work: Callable, task):
    """Run one task without the function mode of ``engine.cpu``, which costs a tenth of a conversion and more.

    A conversion never asks for a device.
    """
    with torch._C.DisableTorchFunction():
        return work(task)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
