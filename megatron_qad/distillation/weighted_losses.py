"""The parsed value of ``--qad-loss``: a weighted sum of losses whose weights may follow a schedule over steps."""

import difflib
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_qad.distillation.loss_registry import Loss
from megatron_qad.engine.errors import QADError


@dataclass(frozen=True)
class Weight:
    """A weight that is ``start_weight`` until step ``start`` and ``end_weight`` from step ``end`` on."""

    start_weight: float = 1.0
    end_weight: float = 1.0
    start: int = 0
    end: int = 0
    schedule: str = "constant"
    """Interpolation between the two: constant, linear or cosine."""

    def __post_init__(self):
        numbers = (self.start_weight, self.end_weight, self.start, self.end)
        if not all(is_number(n) for n in numbers):
            raise QADError(f"weight schedule {self.schedule}{numbers}: expected four finite numbers.")
        if self.schedule not in ("constant", "linear", "cosine"):
            nearest = did_you_mean(self.schedule, ("linear", "cosine"))
            raise QADError(f"unknown schedule {self.schedule!r}, expected linear or cosine{nearest}")
        if self.schedule != "constant" and not self.start < self.end:
            raise QADError(f"schedule {self.schedule}: last step {self.end} must be after first step {self.start}.")

    def at_step(self, step: int) -> float:
        """Return the weight at ``step``, counted from 1."""
        if self.schedule == "constant":
            return self.start_weight
        progress = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        if self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start_weight + progress * (self.end_weight - self.start_weight)


@dataclass(frozen=True)
class Term:
    """One term of a weighted sum of losses."""

    name: str
    """Name in the log. A second "kl" is "kl 2"."""
    loss: Loss
    weight: Weight


@dataclass(frozen=True)
class WeightedLosses:
    """A weighted sum of losses."""

    terms: tuple[Term, ...]

    def terms_of_type(self, kind: type) -> tuple[Term, ...]:
        """Return the terms whose loss is of type ``kind``: ``LogitLoss``, ``HiddenLoss`` or ``ScaleGrowth``."""
        return tuple(term for term in self.terms if isinstance(term.loss, kind))

    @property
    def needs_teacher(self) -> bool:
        return any(term.loss.needs_teacher for term in self.terms)


def is_number(value: object) -> bool:
    """Return whether a value is a finite integer or float, and not a boolean."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return the end of an error message about an unknown ``name``: the nearest valid name, or an empty string."""
    near = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
