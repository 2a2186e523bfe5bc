"""The vocabulary shard of a rank, and walks over its logits in float32 tiles that stay in a cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_qad.distillation.vocab_parallel import LogitLoss

# Elements of one tile. Four tiles of 1 MiB: on one machine tiles of 512 KiB were 1.2 times faster than tiles of 2 MiB,
# because they stay in a core's second-level cache, on another 1.2 times slower, because torch's calls cost more.
TILE_ELEMENTS = 1 << 18
# On a GPU a tile is a few launches: 32 MiB each. Not tuned: no GPU was at hand.
GPU_TILE_ELEMENTS = 1 << 23
# Stands for minus infinity in maxima: a rank whose columns are all padding merges as a zero, never as NaN.
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary the logits of this rank cover."""

    first_column: int
    """Token id of the first column."""
    num_columns: int
    """Columns that are real tokens; those after them are padding."""
    group: object = None
    """Tensor-parallel process group; None is one rank."""

    @classmethod
    def for_rank(cls, width: int, vocab_size: int, group=None) -> "VocabShard":
        """The shard of this rank, whose logits are ``width`` wide, in a vocabulary of ``vocab_size`` unpadded."""
        first = width * (group.rank() if group is not None else 0)
        return cls(first, min(max(vocab_size - first, 0), width), group)


@dataclass
class Tile:
    """Some tokens of this rank's shard, float32 [rows, num_columns], in memory that a loss may overwrite."""

    z_s: Tensor
    """The student's logits over its temperature."""
    z_t: Tensor | None
    """The teacher's over its own; None where the loss needs no teacher."""
    a: Tensor
    b: Tensor
    """Scratch."""
    column: Tensor | None
    """int64 [rows]: the label's column in this shard; negative or >= num_columns where another rank has it."""


def token_tiles(num_tokens: int, num_columns: int, elements: int) -> Iterator[slice]:
    step = max(1, elements // max(1, num_columns))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


class Tiles:
    """Walks over tokens tile by tile, with memory allocated once."""

    def __init__(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None, shard: VocabShard):
        self.student, self.teacher, self.columns = student, teacher, shard.num_columns
        self.column = None if labels is None else labels.reshape(-1) - shard.first_column
        elements = GPU_TILE_ELEMENTS if student.device.type == "cuda" else TILE_ELEMENTS
        self.slices = list(token_tiles(student.shape[0], self.columns, elements))
        self._memory: Tensor | None = None

    def live(self, scale: Tensor) -> list[tuple[slice, bool]]:
        """The tiles in which a token counts, and whether all do. One synchronization with the device."""
        if not self.slices:
            return []
        rows, missing = self.slices[0].stop, self.slices[-1].start + self.slices[0].stop - len(scale)
        some, every = (torch.nn.functional.pad(scale != 0, (0, missing), value=v).view(-1, rows) for v in (False, True))
        found = torch.stack((some.any(dim=1), every.all(dim=1)), dim=1).tolist()
        return [(rows, every) for rows, (some, every) in zip(self.slices, found, strict=True) if some]

    def load(self, rows: slice, loss: "LogitLoss", z_s: Tensor | None = None) -> Tile:
        """A fresh tile for one loss. ``z_s``: the student's float32 logits themselves, to be overwritten."""
        if self._memory is None:  # kernels need none
            shape = (3 if self.teacher is None else 4, self.slices[0].stop, self.columns)
            self._memory = torch.empty(shape, dtype=torch.float32, device=self.student.device)
        memory = self._memory[:, : rows.stop - rows.start]
        if z_s is None:
            z_s = memory[0].copy_(self.student[rows, : self.columns])
        if loss.temperature != 1.0:
            z_s.mul_(1.0 / loss.temperature)
        z_t = None
        if loss.needs_teacher:
            z_t = memory[3].copy_(self.teacher[rows, : self.columns])
            if loss.teacher_temperature != 1.0:
                z_t.mul_(1.0 / loss.teacher_temperature)
        return Tile(z_s, z_t, memory[1], memory[2], None if self.column is None else self.column[rows])
