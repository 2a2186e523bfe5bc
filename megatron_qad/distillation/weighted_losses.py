"""What ``--qad-loss`` says, as frozen data: a weighted sum of losses whose weights may follow a schedule over steps."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_qad.distillation.loss_registry import Loss
from megatron_qad.engine.errors import QADError


@dataclass(frozen=True)
class Weight:
    """A weight over steps, ``start_weight`` until step ``start``, ``end_weight`` from step ``end`` on."""

    start_weight: float = 1.0
    end_weight: float = 1.0
    start: int = 0
    end: int = 0
    schedule: str = "constant"
    """constant, linear or cosine: the way between."""

    def __post_init__(self):
        numbers = (self.start_weight, self.end_weight, self.start, self.end)
        if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
            raise QADError(f"a weight's schedule {self.schedule}{numbers}: expected four numbers")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise QADError(f"unknown schedule {self.schedule!r}{did_you_mean(self.schedule, ('linear', 'cosine'))}")
        if self.schedule != "constant" and not self.start < self.end:
            raise QADError(f"schedule {self.schedule}: its last step {self.end} must come after its first {self.start}")

    def at(self, step: int) -> float:
        """The weight in ``step``, counted from 1."""
        if self.schedule == "constant":
            return self.start_weight
        share = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        if self.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start_weight + share * (self.end_weight - self.start_weight)


@dataclass(frozen=True)
class Term:
    """One part of a weighted sum."""

    name: str
    """By which it is logged; the second "kl" is "kl 2"."""
    loss: Loss
    weight: Weight


@dataclass(frozen=True)
class WeightedLosses:
    """A weighted sum of losses."""

    terms: tuple[Term, ...]

    def terms_of_type(self, kind: type) -> tuple[Term, ...]:
        """The terms whose loss is a ``LogitLoss``, a ``HiddenLoss`` or ``ScaleGrowth``."""
        return tuple(term for term in self.terms if isinstance(term.loss, kind))

    @property
    def needs_teacher(self) -> bool:
        return any(term.loss.needs_teacher for term in self.terms)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The end of an error about an unknown ``name``: the valid one nearest to it, or nothing."""
    near = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
