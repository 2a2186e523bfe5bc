"""Progress of a conversion: share done, rate and time left, on a line of the terminal or in lines of a log."""

import sys
import time

_SECONDS_ON_TERMINAL, _SECONDS_IN_LOG = 0.5, 30.0


class Progress:
    """Prints progress on the first rank; other ranks print nothing.

    Args:
        what: what is done, such as "importing".
        total: bytes of this rank's share.

    Example::

        progress = Progress("importing", total=16_000_000_000, is_shown=True)
        progress.add(500_000_000)  # importing: 3 % of 16.0 GB, 512 MB/s, 0:00:30 left
        progress.finish()
    """

    def __init__(self, what: str, total: int, is_shown: bool):
        self._what, self._total, self._done = what, max(total, 1), 0
        self._is_shown, self._is_terminal = is_shown, sys.stdout.isatty()
        self._start = self._last = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if self._is_shown and now - self._last > (_SECONDS_ON_TERMINAL if self._is_terminal else _SECONDS_IN_LOG):
            self._last = now
            self._print(now)

    def finish(self) -> None:
        """Print the last line, if the conversion took long enough for one before."""
        if self._is_shown and self._last != self._start:
            self._print(time.monotonic())
            if self._is_terminal:
                print(flush=True)

    def _print(self, now: float) -> None:
        line = self.line(now - self._start)
        print(f"\r{line:<79}" if self._is_terminal else line, end="" if self._is_terminal else "\n", flush=True)

    def line(self, seconds: float) -> str:
        """Return the progress after ``seconds``."""
        rate = self._done / max(seconds, 1e-9)
        left = int((self._total - self._done) / rate) if rate else 0
        return (
            f"megatron_qad: {self._what}: {self._done / self._total:.0%} of {self._total / 1e9:.3g} GB, "
            f"{rate / 1e6:.0f} MB/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
