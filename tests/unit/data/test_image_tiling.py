"""Grids and tiles of images: hand-computed cases and properties of both rules."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_qad.data.images.image_settings import ImageSettings
from megatron_qad.data.images.tiling import choose_grid, count_tiles, cut_tiles
from megatron_qad.engine.errors import QADError

RULES = ("closest_ratio", "area_weighted")


@pytest.mark.parametrize(
    "width, height, grid",
    [
        (1024, 1024, (2, 2)),  # ratio 1: 1x1, 2x2 and 3x3 fit equally; 2^20 pixels are more than half of 4 tiles'
        (512, 512, (1, 1)),  # 2^18 pixels are less than half of the pixels of 2x2
        (1100, 1100, (3, 3)),  # 1.21 million pixels; half of 9 tiles is 1.18 million
        (1080, 1080, (2, 2)),  # 1.17 million
        (800, 600, (4, 3)),  # 4/3 exactly
        (384, 512, (3, 4)),  # 3/4 exactly, also for an image that is smaller than one tile
        (1000, 500, (2, 1)),  # ratio 2; half a million pixels are less than half of 4x2's
        (3000, 1500, (4, 2)),  # ratio 2, large
        (100, 1, (12, 1)),
        (1, 100, (1, 12)),
        (384, 768, (1, 2)),  # 1/2; 2x4 would need more than 2^20 pixels
    ],
)
def test_closest_ratio_by_hand(image_settings, width, height, grid):
    assert choose_grid(width, height, replace(image_settings, tile_size=512, max_tiles=12)) == grid


@pytest.mark.parametrize(
    "width, height, grid",
    [
        (1024, 1024, (2, 2)),  # 1x1: 0.25 of the pixels; 2x1: 0.5 of them, times the ratio 1/2; 2x2: the limit 0.6
        (512, 512, (1, 1)),  # 1x1 has all pixels: 0.6; the larger squares have no more
        (640, 640, (1, 1)),  # 0.64 of the pixels are enough, where 2x2 has all
        (700, 700, (2, 2)),  # 1x1 has 0.535, 2x2 the limit
        (800, 600, (4, 3)),  # 1x1: 0.546 * 0.75 = 0.41; 2x1: 0.6 * 2/3 = 0.4; 2x2: 0.6 * 0.75 = 0.45; 4x3: 0.6
        (384, 512, (3, 4)),
        (1000, 500, (2, 1)),
        (100, 1, (12, 1)),
    ],
)
def test_area_weighted_by_hand(image_settings, width, height, grid):
    rule = replace(image_settings, tile_size=512, max_tiles=12, grid_rule="area_weighted")
    assert choose_grid(width, height, rule) == grid


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), max_tiles=st.integers(1, 12))
def test_grids_have_at_most_the_largest_number_of_tiles(image_settings, rule, width, height, max_tiles):
    rule = replace(image_settings, grid_rule=rule, max_tiles=max_tiles)
    columns, rows = choose_grid(width, height, rule)
    assert 1 <= columns * rows <= max_tiles
    assert count_tiles(width, height, rule) == columns * rows + (columns * rows > 1)
    assert count_tiles(width, height, replace(rule, use_thumbnail=False)) == columns * rows
    # Wide images have wide grids; a square grid only where neither side is longer.
    assert (columns - rows) * (width - height) >= 0


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(columns=st.integers(1, 4), rows=st.integers(1, 4))
def test_an_image_of_the_size_of_a_grid_is_cut_without_change(image_settings, rule, columns, rows):
    """Every tile then is that part of the image, in reading order; the thumbnail is last."""
    rule = replace(image_settings, grid_rule=rule, max_tiles=16)
    random = np.random.default_rng(columns * 10 + rows)
    pixels = random.integers(0, 256, (rows * 64, columns * 64, 3), dtype=np.uint8)
    tiles = cut_tiles(Image.fromarray(pixels), rule)
    grid = choose_grid(columns * 64, rows * 64, rule)
    assert grid[0] * rows == grid[1] * columns, "the ratio is met exactly"
    assert tiles.dtype == np.uint8 and tiles.shape == (count_tiles(columns * 64, rows * 64, rule), 3, 64, 64)
    if grid == (columns, rows):
        for i in range(columns * rows):
            row, column = divmod(i, columns)
            part = pixels[row * 64 : (row + 1) * 64, column * 64 : (column + 1) * 64]
            assert np.array_equal(tiles[i], part.transpose(2, 0, 1))


def test_thumbnail_shows_the_whole_image(image_settings):
    """An image is red on the left and blue on the right: each tile has one color, and the thumbnail has both."""
    image = Image.new("RGB", (128, 64), "red")
    image.paste("blue", (64, 0, 128, 64))
    left, right, thumbnail = cut_tiles(image, image_settings)
    assert (left[0] == 255).all() and (left[2] == 0).all() and (right[2] == 255).all() and (right[0] == 0).all()
    assert (thumbnail[0, :, :28] == 255).all() and (thumbnail[2, :, 36:] == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_sides_of_one_pixel_are_stretched(image_settings, size):
    tiles = cut_tiles(Image.new("RGB", size, (10, 20, 30)), image_settings)
    assert len(tiles) == {(1, 1): 1, (1, 300): 5, (300, 1): 5}[size]
    assert [int(tiles[:, c].min()) for c in range(3)] == [int(tiles[:, c].max()) for c in range(3)] == [10, 20, 30]


def test_settings_survive_json_and_refuse_nonsense(image_settings):
    assert ImageSettings.from_dict(image_settings.to_dict()) == image_settings
    assert image_settings.differences(replace(image_settings, tile_size=32)) == ["tile_size: 64, 32"]
    for content, problem in (({"tile_size": "64"}, "'tile_size'"), ({"color": 1}, "'color'")):
        with pytest.raises(QADError, match=problem):
            ImageSettings.from_dict(image_settings.to_dict() | content)
    with pytest.raises(QADError, match="grid_rule is 'nearest', expected one of closest_ratio, area_weighted"):
        replace(image_settings, grid_rule="nearest")
    with pytest.raises(QADError, match="max_tiles is 0"):
        replace(image_settings, max_tiles=0)
