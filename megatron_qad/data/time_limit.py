"""A limit of the processor time that a block of Python code may use."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class TimeLimitExceeded(BaseException):
    """Raised inside of a block that used its processor time. No ``Exception``, so that the block does not handle it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeLimitExceeded`` in the block after ``seconds`` of this process's own processor time.

    Processor time does not depend on what else the machine does, and its signal (SIGVTALRM) is not the one that other
    timers use. Python handles signals between two bytecode instructions, so one long call of C code is interrupted when
    it returns. Threads other than the main thread cannot receive signals; in them there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum, frame):
        raise TimeLimitExceeded

    previous = signal.signal(signal.SIGVTALRM, expire)
    try:
        # Repeated: Python ignores an exception that is raised while an object's finalizer runs.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous or signal.SIG_DFL)
