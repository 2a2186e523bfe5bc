"""Factors of smoothing: powers of two, each block by itself, no block's size changed; and what they are for."""

import pytest
import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.quantization.smoothing import SmoothingPair, block_factors


def squares_of(*exponents: float) -> torch.Tensor:
    """Mean squares of a block of 16 whose first channels' rms are 2 to these powers, the others' 1."""
    return torch.tensor([2.0 ** (2 * e) for e in exponents] + [1.0] * (16 - len(exponents)), dtype=torch.float64)


def test_an_outlier_gives_the_asked_share_of_its_range():
    factors = block_factors(squares_of(8), 0.5)
    # The block's geometric mean is 2^0.5: 2^7.5 of distance, half of it rounded, above; 2^-0.25, rounded, below.
    assert factors.tolist() == [16.0] + [1.0] * 15
    assert block_factors(squares_of(8), 1.0)[0] == 2**8  # 7.5, a tie, to the even exponent
    assert block_factors(squares_of(8), 1.0)[1] == 1.0


def test_blocks_do_not_know_of_each_other_or_of_their_size():
    one, other = squares_of(8), squares_of(0, -6, 3)
    apart = torch.cat([block_factors(one, 0.5), block_factors(other, 0.5)])
    assert torch.equal(block_factors(torch.cat([one, other]), 0.5), apart)
    assert torch.equal(block_factors(one * 1e9, 0.5), block_factors(one, 0.5))


def test_dead_channels_are_not_blown_up():
    """A channel that calibration saw at zero may wake: it counts as 2^-8 of its block's largest."""
    assert block_factors(torch.zeros(16, dtype=torch.float64), 0.5).tolist() == [1.0] * 16
    dead = torch.cat([torch.zeros(8), torch.ones(8)]).double()
    assert block_factors(dead, 1.0).tolist() == [2.0**-4] * 8 + [2.0**4] * 8


def test_a_factor_that_arrives_twice_is_taken_once():
    """Behind a squared ReLU the columns are multiplied by the factor's square."""
    squares = squares_of(6, -2, 3)
    assert block_factors(squares, 0.5)[:4].tolist() == [8.0, 0.5, 2.0, 1.0]
    assert block_factors(squares, 0.5, power=2)[:4].tolist() == [2.0, 0.5, 2.0, 1.0]


def quantized_error(x: torch.Tensor, weight: torch.Tensor) -> float:
    def rounded(t):
        return nvfp4.fake_quant(t, nvfp4.global_scale_from_amax(t.abs().max()))

    exact = x @ weight.T
    return ((rounded(x) @ rounded(weight).T - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_outlier_costs_less_and_the_product_stays(dtype):
    torch.manual_seed(0)
    rows, columns = (torch.randn(128, 32) / 32**0.5).to(dtype), (torch.randn(48, 128) / 128**0.5).to(dtype)
    rows[5::16] *= 32
    columns[:, 5::16] /= 32  # outliers that the reader does not need as large, as behind a norm's large weight
    source = torch.randn(512, 32).to(dtype)
    before = source @ rows.T
    pair = SmoothingPair("linear", [rows], [columns], watch=None)
    pair.observe(before[:256])
    pair.observe(before[256:])
    product, error = before @ columns.T, quantized_error(before.float(), columns.float())
    factors = pair.apply_(0.5)
    after = source @ rows.T
    assert torch.equal(after @ columns.T, product) and torch.equal(after * factors.to(dtype), before)
    smoothed = quantized_error(after.float(), columns.float())
    print(f"{dtype}: relative error {error:.3f} -> {smoothed:.3f}")
    assert smoothed < error / 2


def test_too_few_tokens_change_nothing():
    rows, columns = torch.randn(16, 4), torch.randn(8, 16)
    pair = SmoothingPair("expert", [rows], [columns], watch=None, min_tokens=16)
    pair.observe(torch.randn(15, 16) * squares_of(8).float())
    kept = rows.clone(), columns.clone()
    assert pair.apply_(0.5).tolist() == [1.0] * 16
    assert torch.equal(rows, kept[0]) and torch.equal(columns, kept[1])


def test_nan_is_named():
    pair = SmoothingPair("decoder.layers.1.mlp.linear_fc2", [torch.ones(16, 4)], [torch.ones(8, 16)], watch=None)
    pair.observe(torch.full((4, 16), torch.nan))
    with pytest.raises(QADError, match=r"layers\.1\.mlp\.linear_fc2 contains NaN or Inf"):
        pair.apply_(0.5)
