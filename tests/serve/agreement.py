"""How an engine's log-probabilities agree with the student's, and the table of results that a test run prints."""

from dataclasses import asdict, dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Agreement of two arrays of log-probabilities over all positions."""

    kl: float
    """Mean KL(student || engine), in nats per token."""
    largest: float
    """Largest difference of two log-probabilities."""
    top1: float
    """Share of positions with the same most likely token."""

    @classmethod
    def of(cls, student: np.ndarray, engine: np.ndarray) -> Self:
        """Compare float32 arrays [n, s, V]. NaN makes ``kl`` and ``largest`` NaN, which no limit admits."""
        student, engine = student.astype(np.float64), engine.astype(np.float64)
        kl = (np.exp(student) * (student - engine)).sum(-1).mean()
        top1 = (student.argmax(-1) == engine.argmax(-1)).mean()
        return cls(float(kl), float(np.abs(student - engine).max()), float(top1))

    def row(self, family: str, layout: str, served: str) -> dict:
        """Return a row for ``record_property("served", row)``, which tests/conftest.py prints."""
        return {"family": family, "layout": layout, "served": served} | asdict(self)
