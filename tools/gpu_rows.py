"""Rows of tools/gpu_check.py's table, and how numbers are written in them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Machine:
    device: str
    """"cuda" or "cpu"."""
    is_tiny: bool
    """Use tiny sizes, for which no speed or memory goal is judged."""

    def judge(self, is_reached: bool) -> str:
        """The verdict on a goal of speed or memory."""
        return "-" if self.is_tiny else verdict(is_reached)


@dataclass(frozen=True)
class Row:
    """One line of the table. A verdict is "pass", "fail", or "-" where nothing is judged."""

    what: str
    size: str
    ours: str
    peer: str = "-"
    ratio: str = "-"
    goal: str = "-"
    verdict: str = "-"


@dataclass(frozen=True)
class Check:
    name: str
    seconds: int
    """Time limit in seconds, including imports and compilation."""
    rows: Callable[[Machine], Iterator[Row]]


def verdict(is_reached: bool) -> str:
    return "pass" if is_reached else "fail"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def as_fast(theirs: float, ours: float) -> str:
    return f"{theirs / ours:.2f} times as fast"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def pair(numbers) -> str:
    return ", ".join(f"{number:.1e}" for number in numbers)


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
