"""Rounding to E4M3 and E2M1 and the bitwise amax, against the operations that they replace."""

import torch

from megatron_qad.formats.common import amax_bits, round_to_e4m3_
from megatron_qad.formats.e2m1 import E2M1_VALUES, round_to_e2m1_


def every_float(step=257):
    """Return every 257th float32 of both signs (prime, so that all low bits occur), every tie and its neighbours."""
    positive = torch.arange(0, 0x7F800000, step, dtype=torch.int32).view(torch.float32)
    grids = [torch.tensor(E2M1_VALUES[:8]), torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()]
    ties = torch.cat([torch.cat([grid, (grid[1:] + grid[:-1]) / 2]) for grid in grids])
    near = torch.cat([ties, ties.nextafter(ties.new_tensor(torch.inf)), ties.nextafter(ties.new_tensor(-torch.inf))])
    return torch.cat([positive, -positive, near, -near])


def test_round_to_e4m3_equals_cast():
    x = every_float()
    cast = x.clamp(-448, 448).to(torch.float8_e4m3fn).float() + 0.0
    rounded = round_to_e4m3_(x)
    assert torch.equal(rounded, cast)
    assert not torch.signbit(rounded[rounded == 0]).any()


def test_round_to_e2m1_equals_definition():
    x = every_float(1031)
    grid = torch.tensor(E2M1_VALUES[:8])
    magnitude = x.abs().clamp(max=6)
    upper = torch.bucketize(magnitude, grid)  # index of the first grid value >= magnitude
    lower = (upper - 1).clamp(min=0)
    above, below = grid[upper] - magnitude, magnitude - grid[lower]
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))  # the index is the code, so ties go to even
    expected = torch.where(take_upper, grid[upper], grid[lower]) * x.sign()
    assert torch.equal(round_to_e2m1_(x), expected)


def test_rounding_and_amax_keep_nan():
    nan = torch.tensor([1.0, torch.nan, -3.0])
    assert round_to_e4m3_(nan.clone()).isnan().tolist() == [False, True, False]
    assert round_to_e2m1_(nan.clone()).isnan().tolist() == [False, True, False]
    x = torch.tensor([[1.0, -3.0, 2.0], [-torch.inf, 1.0, 0.0], [torch.nan, torch.inf, 0.0], [-0.0, 0.0, -0.0]])
    amax = amax_bits(x, -1)
    assert amax[:2, 0].tolist() == [3.0, torch.inf] and amax[2].isnan() and not torch.signbit(amax[3])
    assert torch.equal(amax_bits(-x[:2], 0), torch.tensor([[torch.inf, 3.0, 2.0]]))
