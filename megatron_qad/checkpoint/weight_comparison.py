"""How far an exported tensor is from that of the model which training began from, and how far it may be.

Both rounding and training move every weight by a small random amount. Damage does not: a tensor in the place of another
has a relative error near 1.4, a scale that is wrong by two has 1, and block scales of another tensor multiply every
block by a factor of its own. So three figures are compared with what rounding and training explain:

- the error of the tensor, the root of sum (w - w0)^2 / sum w0^2;
- the error of its worst row, relative to the row and to an average row, since a row of almost zeros may move freely;
- the spread of the gains of its blocks, for formats with block scales. The gain of a block is sum w0 w / sum w0^2.

Independent errors of a relative size d on the n weights of a block change its gain by d / sqrt(n), whatever the
weights are. Block scales in the wrong place change it by 0.2 and more for n = 16, because the largest of 16 values
varies that much.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_qad.formats.format import NumberFormat

_TILE_ELEMENTS = 1 << 20
MAX_MATRIX_MOVEMENT = 0.5
"""Largest relative distance of a matrix that is taken for training. Measured: docs/validator.md."""
MAX_VECTOR_MOVEMENT = 0.25
"""The same for norms and biases of exports that do not record how far training can have moved a weight."""
_CAST_ERROR = 2.0**-8
"""Bound of the relative error of a cast to bfloat16, whose rounding error is at most 2^-9."""
_MAX_ROW_ERROR = 0.65
"""Two average rows that are swapped have 1.0, an average row of zeros 0.71; training by 0.45 gives up to 0.5."""
_GAIN_FLOOR, _GAIN_FACTOR = 0.01, 2.0
"""Allowed spread of block gains: floor + factor * d / sqrt(n)."""
_MEAN_GAIN_FLOOR, _MEAN_GAIN_FACTOR = 0.03, 0.3
"""Allowed distance of a tensor's gain from 1: floor + factor * d."""


@dataclass
class Comparison:
    """Sums over a tensor [rows, columns] and the original, collected tile by tile."""

    block_size: int = 1
    """Elements of a row that share a scale. 1: no block scales."""
    energy: float = 0.0  # sum of w0^2
    error: float = 0.0  # sum of (w - w0)^2
    product: float = 0.0  # sum of w0 * w
    gains: float = 0.0  # sum over blocks of (sum of w0 * w)^2 / (sum of w0^2)
    count: int = 0
    amax: float = 0.0
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # error and energy of each row

    def add(self, weight: Tensor, original: Tensor) -> None:
        """Add a tile of rows, [rows, columns] each."""
        weight, original = weight.float(), original.float()
        squares, products, errors = original.square(), original * weight, (weight - original).square_()
        energies, row_errors = squares.sum(1, dtype=torch.float64), errors.sum(1, dtype=torch.float64)
        self.rows.append((row_errors, energies))
        self.energy += energies.sum().item()
        self.error += row_errors.sum().item()
        self.product += products.sum(dtype=torch.float64).item()
        self.count += weight.numel()
        self.amax = max(self.amax, weight.abs().max().item()) if weight.numel() else self.amax
        if self.block_size > 1:
            energy, product = (x.view(-1, self.block_size).sum(1, dtype=torch.float64) for x in (squares, products))
            self.gains += torch.where(energy > 0, product.square() / energy, 0.0).sum().item()

    @property
    def rms(self) -> float:
        """Root mean square of the original."""
        return math.sqrt(self.energy / self.count) if self.count else 0.0

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.error / self.energy) if self.energy else math.inf if self.error else 0.0

    @property
    def worst_row(self) -> tuple[int, float]:
        """Index and error of the row with the largest error, relative to the mean of its energy and the average."""
        errors, energies = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        relative = (errors / (energies + energies.mean()).clamp_min(1e-300)).sqrt()
        row = int(torch.nan_to_num(relative, nan=math.inf).argmax())
        return row, relative[row].item()

    @property
    def mean_gain(self) -> float:
        return self.product / self.energy if self.energy else 1.0

    @property
    def gain_spread(self) -> float:
        """Root mean square of the blocks' gains around the tensor's, weighted by the energies of the blocks."""
        if not self.energy or self.block_size == 1:
            return 0.0
        return math.sqrt(max(self.gains / self.energy - self.mean_gain**2, 0.0))

    @property
    def independent_error(self) -> float:
        """Relative error without the part that gains of blocks or of the tensor explain."""
        if not self.energy:
            return 0.0
        explained = self.gains if self.block_size > 1 else self.product**2 / self.energy
        return math.sqrt(max(self.error - explained + 2 * self.product - self.energy, 0.0) / self.energy)


@dataclass(frozen=True)
class Bounds:
    """What rounding and training explain."""

    rounding: float
    """Relative error of the tensor's format."""
    movement: float | None
    """Largest distance by which training can have moved a weight. None: not recorded."""

    @classmethod
    def of(cls, number_format: NumberFormat | None, movement: float | None) -> "Bounds":
        return cls(_CAST_ERROR if number_format is None else number_format.rounding_error, movement)

    def problem(self, found: Comparison, is_matrix: bool) -> str | None:
        """Return what is wrong with a tensor, or None."""
        allowed = self.rounding + self._movement(found.rms, is_matrix)
        if not found.relative_error <= allowed:
            return f"has a relative error of {found.relative_error:.3g}, expected at most {allowed:.3g}"
        if not is_matrix or not found.energy:
            return None
        row, row_error = found.worst_row
        if not row_error <= _MAX_ROW_ERROR:
            return f"has a relative error of {row_error:.3g} in row {row}, expected at most {_MAX_ROW_ERROR}"
        allowed = _MEAN_GAIN_FLOOR + _MEAN_GAIN_FACTOR * found.independent_error
        if not abs(found.mean_gain - 1) <= allowed:
            return f"is {found.mean_gain:.3g} times as large, expected 1 within {allowed:.2g}: a scale is wrong"
        allowed = _GAIN_FLOOR + _GAIN_FACTOR * found.independent_error / math.sqrt(found.block_size)
        if not found.gain_spread <= allowed:
            return (
                f"has blocks of {found.block_size} values that are larger or smaller by {found.gain_spread:.2g}, "
                f"expected at most {allowed:.2g}: block scales are wrong"
            )
        return None

    def _movement(self, rms: float, is_matrix: bool) -> float:
        """Return the allowed distance by training, relative to ``rms``."""
        if not rms:
            return 0.0 if self.movement == 0 else math.inf
        recorded = math.inf if self.movement is None else self.movement / rms
        if is_matrix:
            return min(recorded, MAX_MATRIX_MOVEMENT)
        return MAX_VECTOR_MOVEMENT if self.movement is None else recorded


def row_tiles(rows: int, columns: int) -> list[slice]:
    """Return slices of rows with about a million elements."""
    step = max(_TILE_ELEMENTS // max(columns, 1), 1)
    return [slice(start, start + step) for start in range(0, rows, step)]
