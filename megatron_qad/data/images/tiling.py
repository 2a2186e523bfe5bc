"""Cuts images into square tiles: which grid, how many tiles, and their pixels."""

import numpy as np
from PIL import Image

from megatron_qad.data.images.image_settings import ImageSettings

_ENOUGH_AREA = 0.6
"""Share of an image's area from which a larger grid gains nothing more in the rule "area_weighted"."""


def choose_grid(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """Return (columns, rows) of the grid of tiles for an image of ``width`` x ``height`` pixels.

    The candidates are all grids of 1 to ``max_tiles`` tiles, from few tiles to many.

    - "closest_ratio" (InternVL): the grid whose ratio of columns to rows has the smallest absolute difference from the
      image's. Of several such grids a larger one replaces a smaller one if the image has more than half of its pixels.
    - "area_weighted" (Llama Nemotron Nano VL): the grid with the largest product of its pixels over the image's, at
      most 0.6, and the smaller of both ratios over the larger. Of several such grids, the one with the fewest tiles.
    """
    ratio, area, tile_area = width / height, width * height, settings.tile_size**2
    best, best_score = (1, 1), -np.inf
    for columns, rows in _grids(settings.max_tiles):
        grid_ratio, grid_area = columns / rows, columns * rows * tile_area
        if settings.grid_rule == "closest_ratio":
            score = -abs(ratio - grid_ratio)
            is_better = score > best_score or score == best_score and area > 0.5 * grid_area
        else:
            score = min(grid_area / area, _ENOUGH_AREA) * min(grid_ratio / ratio, ratio / grid_ratio)
            is_better = score > best_score
        if is_better:
            best, best_score = (columns, rows), score
    return best


def _grids(max_tiles: int) -> list[tuple[int, int]]:
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if columns * rows <= max_tiles]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def count_tiles(width: int, height: int, settings: ImageSettings) -> int:
    """Return the number of tiles of an image, its thumbnail included."""
    columns, rows = choose_grid(width, height, settings)
    return columns * rows + (settings.use_thumbnail and columns * rows > 1)


def cut_tiles(image: Image.Image, settings: ImageSettings) -> np.ndarray:
    """Return the tiles of an RGB image in reading order, the thumbnail last: uint8 [n, 3, tile_size, tile_size].

    The image is resized to the grid with Pillow's bicubic filter, which is antialiased; its shape is not kept.
    """
    size, (columns, rows) = settings.tile_size, choose_grid(*image.size, settings)
    pixels = np.asarray(image.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
    tiles = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
    if settings.use_thumbnail and columns * rows > 1:
        thumbnail = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
        tiles = np.concatenate([tiles, thumbnail.transpose(2, 0, 1)[None]])
    return np.ascontiguousarray(tiles)
