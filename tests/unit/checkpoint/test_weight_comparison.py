"""Bounds of ``validate --against``: rounding and training of any size stay within them, damage does not."""

import pytest
import torch

from megatron_qad.checkpoint.weight_comparison import Bounds, Comparison, row_tiles
from megatron_qad.formats.common import tensor_amax
from megatron_qad.formats.format_registry import FORMATS

SHAPE = (64, 256)
WEIGHTS = {
    "normal": lambda g: torch.randn(SHAPE, generator=g) * 0.02,
    "heavy tails": lambda g: (
        (torch.randn(SHAPE, generator=g) / torch.randn(SHAPE, generator=g).abs().clamp(0.3)) * 0.02
    ),
    "outlier columns": lambda g: torch.randn(SHAPE, generator=g) * torch.randn(SHAPE[1], generator=g).exp() * 0.02,
    "rows of many sizes": lambda g: (
        torch.randn(SHAPE, generator=g) * (1.5 * torch.randn(SHAPE[0], 1, generator=g)).exp()
    ),
    "dead rows": lambda g: (
        torch.randn(SHAPE, generator=g) * (torch.arange(SHAPE[0]) % 4 > 0).float().unsqueeze(1) * 0.02
    ),
}
RULES = [("nvfp4", rule) for rule in ("max", "four_over_six", "mse")] + [("fp8", "max"), ("int4-w4a16", "max")]


def compare(weight, original, fmt) -> Comparison:
    comparison = Comparison(FORMATS[fmt].weight.block_size)
    for rows in (slice(0, 10), slice(10, None)):
        comparison.add(weight[rows], original[rows])
    return comparison


def packed(weight, fmt, rule):
    number = FORMATS[fmt].weight
    scale = number.scale_from_amax(tensor_amax(weight), rule=rule)
    return number, number.quantize(weight, scale, rule=rule), scale


@pytest.mark.parametrize("fmt, rule", RULES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_rounding_and_training_are_allowed(kind, fmt, rule):
    generator = torch.Generator().manual_seed(len(kind))
    original = WEIGHTS[kind](generator)
    rms = original.square().mean().sqrt()
    for distance in (0.0, 0.02, 0.1, 0.4):
        trained = original + torch.randn(SHAPE, generator=generator) * rms * distance
        number, codes, scale = packed(trained, fmt, rule)
        found = compare(number.dequantize(codes, scale, torch.float32), original, fmt)
        for movement in (2 * distance * rms.item(), None):
            assert Bounds.of(number, movement).problem(found, is_matrix=True) is None, (distance, found.gain_spread)


@pytest.mark.parametrize("fmt, rule", [case for case in RULES if case[0] != "fp8"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_block_scales_in_the_wrong_place_are_found(kind, fmt, rule):
    """Also after training by a third of the weights' size, and if the distance of training is not recorded."""
    generator = torch.Generator().manual_seed(len(kind))
    original = WEIGHTS[kind](generator)
    for distance in (0.0, 0.3):
        trained = original + torch.randn(SHAPE, generator=generator) * original.square().mean().sqrt() * distance
        number, codes, scale = packed(trained, fmt, rule)
        blocks = codes["block_scale"]
        flat = blocks.view(torch.uint8 if blocks.element_size() == 1 else torch.int16).flatten()
        codes["block_scale"] = (
            flat[torch.randperm(len(flat), generator=generator)].view(blocks.dtype).view(blocks.shape)
        )
        found = compare(number.dequantize(codes, scale, torch.float32), original, fmt)
        assert Bounds.of(number, None).problem(found, is_matrix=True) is not None


DAMAGE = {
    "another tensor": lambda w: w.flip(0),
    "zero": torch.zeros_like,
    "1.2 times": lambda w: w * 1.2,
    "half": lambda w: w / 2,
    "negated": lambda w: -w,
    "two rows swapped": lambda w: w[[1, 0, *range(2, len(w))]],
    "NaN": lambda w: w * float("nan"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_without_a_record_of_training(damage):
    original = WEIGHTS["normal"](torch.Generator().manual_seed(1))
    found = compare(DAMAGE[damage](original), original, "nvfp4")
    assert Bounds.of(FORMATS["nvfp4"].weight, None).problem(found, is_matrix=True)


def test_movement_bounds_norms_by_what_training_can_have_done():
    original = torch.linspace(0.5, 1.5, 64).view(1, -1)
    moved = compare(original + 0.01, original, "fp8")
    cast = compare(original.bfloat16(), original, "fp8")
    assert Bounds.of(None, 0.01).problem(moved, is_matrix=False) is None
    assert Bounds.of(None, 0.0).problem(moved, is_matrix=False).startswith("has a relative error of 0.0096")
    assert Bounds.of(None, 0.0).problem(cast, is_matrix=False) is None
    zero = compare(torch.full((1, 64), 0.01), torch.zeros(1, 64), "fp8")
    assert Bounds.of(None, 0.01).problem(zero, is_matrix=False) is None
    assert Bounds.of(None, 0.0).problem(zero, is_matrix=False).startswith("has a relative error of inf")


def test_tiles_cover_all_rows():
    assert row_tiles(5, 1 << 21) == [slice(i, i + 1) for i in range(5)]
    assert row_tiles(3, 0) == [slice(0, 1 << 20)]
