"""Means over tokens with bootstrap intervals, and paired differences of models on the same tokens.

The bootstrap draws rows, not tokens: the tokens of a row share their text, so they vary together, and drawing tokens
would give intervals that are too narrow. All models of a comparison get the same draws, so that the interval of a
difference is not widened by the text: a hard row is hard for all of them.
"""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Probability that an interval covers the value, over texts like these."""
FEW_ROWS = 20
"""Below this number of rows, an interval is a rough guess and usually too narrow."""
_SEED = 20260120  # arbitrary, but the same for all comparisons


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval. The interval is None if there is only one row to draw from."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> "Interval":
        """Return ``value`` with the interval that its values in the draws [draws] give."""
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return cls(value, float(low), float(high))

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)

    def record(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


class RowBootstrap:
    """Draws of rows with replacement, the same for every model and metric.

    Args:
        row: row of each token, int [tokens].
        num_samples: number of draws.
        seed: of the draws. Two sets of rows that are independent, such as the problems of two benchmarks, need two.

    Example:
        >>> bootstrap = RowBootstrap(np.array([0, 0, 1]), num_samples=100)
        >>> bootstrap.mean(np.array([1.0, 2.0, 3.0])).value
        2.0
    """

    def __init__(self, row: np.ndarray, num_samples: int = 2000, seed: int = _SEED):
        _, self._row = np.unique(row, return_inverse=True)
        self.num_rows = int(self._row.max()) + 1
        rng = np.random.default_rng(seed)
        shares = np.full(self.num_rows, 1 / self.num_rows)
        # Row counts per draw; a count takes 4 bytes, so 2000 draws of 10^4 rows take 80 MB.
        self._draws = rng.multinomial(self.num_rows, shares, size=num_samples).astype(np.float32)

    def mean(self, values: np.ndarray) -> Interval:
        """Return the mean over tokens of ``values`` [tokens]."""
        return self._interval(float(values.mean(dtype=np.float64)), self.means(values))

    def difference(self, values: np.ndarray, baseline: np.ndarray) -> Interval:
        """Return the mean over tokens of ``values - baseline``."""
        return self.mean(values.astype(np.float64) - baseline)

    def ratio(self, values: np.ndarray, baseline: np.ndarray) -> Interval | None:
        """Return the ratio of two means, or None if that of ``baseline`` is not positive."""
        means, of_baseline = self.means(values), self.means(baseline)
        value, base = (float(v.mean(dtype=np.float64)) for v in (values, baseline))
        if base <= 0 or (of_baseline <= 0).any():
            return None
        return self._interval(value / base, means / of_baseline)

    def means(self, values: np.ndarray) -> np.ndarray:
        """Return the mean over tokens in each draw, float64 [draws]."""
        sums = np.bincount(self._row, weights=values, minlength=self.num_rows)
        counts = np.bincount(self._row, minlength=self.num_rows)
        return (self._draws @ sums) / (self._draws @ counts)

    def _interval(self, value: float, draws: np.ndarray) -> Interval:
        return Interval.of(value, draws) if self.num_rows > 1 else Interval(value)
