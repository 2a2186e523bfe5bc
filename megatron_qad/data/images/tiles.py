"""The pixels of a batch's tiles, which torch's data loader joins and pins as it does with tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map


class Tiles:
    """Tiles of the images of one or more rows.

    Args:
        pixels: uint8 [n, 3, tile_size, tile_size], RGB; the tiles of the first row first. n is 0 in a row without
            images and where tiles are not decoded.
        counts: int64 [rows], the number of tiles of each row, also where they are not decoded.
    """

    def __init__(self, pixels: Tensor, counts: Tensor):
        self.pixels, self.counts = pixels, counts

    def pin_memory(self) -> "Tiles":
        return Tiles(self.pixels.pin_memory(), self.counts.pin_memory())

    @staticmethod
    def join(rows: Sequence["Tiles"]) -> "Tiles":
        """Return the tiles of all rows, in order."""
        return Tiles(torch.cat([row.pixels for row in rows]), torch.cat([row.counts for row in rows]))


def register_collation() -> None:
    """Let torch's default collation join ``Tiles``. torch keeps a table for this, one for each process."""
    default_collate_fn_map[Tiles] = lambda rows, *, collate_fn_map=None: Tiles.join(rows)
