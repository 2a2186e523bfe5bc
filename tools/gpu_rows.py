"""Rows of the table of tools/gpu_check.py, and the formatting of their numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Machine:
    """The device to check, and whether sizes are tiny."""

    device: str
    """Device type, "cuda" or "cpu"."""
    is_tiny: bool
    """Whether to use tiny sizes, for which no speed or memory goal is judged."""

    def judge(self, is_reached: bool) -> str:
        """Return the verdict on a speed or memory goal."""
        return "-" if self.is_tiny else verdict(is_reached)


@dataclass(frozen=True)
class Row:
    """One row of the table. A verdict is "pass", "fail", or "-" if nothing is judged."""

    what: str
    size: str
    ours: str
    peer: str = "-"
    ratio: str = "-"
    goal: str = "-"
    verdict: str = "-"


@dataclass(frozen=True)
class Check:
    """A check of tools/gpu_check.py."""

    name: str
    seconds: int
    """Time limit in seconds, including imports and compilation."""
    rows: Callable[[Machine], Iterator[Row]]


def verdict(is_reached: bool) -> str:
    return "pass" if is_reached else "fail"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def as_fast(peer: float, ours: float) -> str:
    return f"{peer / ours:.2f} times as fast"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def pair(values) -> str:
    return ", ".join(f"{value:.1e}" for value in values)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
