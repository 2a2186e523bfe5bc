"""Tests of the smoothing factors of a block and of one smoothing pair."""

import pytest
import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.quantization.smoothing import SmoothingPair, block_factors


def squares_of(*exponents: float) -> torch.Tensor:
    """Mean squares of a block of 16 channels: rms 2**exponent for the first ones and 1 for the others."""
    return torch.tensor([2.0 ** (2 * e) for e in exponents] + [1.0] * (16 - len(exponents)), dtype=torch.float64)


def test_alpha_sets_how_much_of_an_outlier_moves():
    factors = block_factors(squares_of(8), 0.5)
    # The geometric mean is 2^0.5. The outlier is 2^7.5 above it: 3.75 rounds to 2^4. The others: -0.25 rounds to 2^0.
    assert factors.tolist() == [16.0] + [1.0] * 15
    assert block_factors(squares_of(8), 1.0)[0] == 2**8  # 7.5 is a tie and rounds to the even exponent
    assert block_factors(squares_of(8), 1.0)[1] == 1.0


def test_factors_depend_only_on_ratios_within_a_block():
    first, second = squares_of(8), squares_of(0, -6, 3)
    separate = torch.cat([block_factors(first, 0.5), block_factors(second, 0.5)])
    assert torch.equal(block_factors(torch.cat([first, second]), 0.5), separate)
    assert torch.equal(block_factors(first * 1e9, 0.5), block_factors(first, 0.5))


def test_factors_of_zero_channels_are_bounded():
    """A channel that was zero in calibration may change later: its rms counts as 2^-8 of the largest in its block."""
    assert block_factors(torch.zeros(16, dtype=torch.float64), 0.5).tolist() == [1.0] * 16
    dead = torch.cat([torch.zeros(8), torch.ones(8)]).double()
    assert block_factors(dead, 1.0).tolist() == [2.0**-4] * 8 + [2.0**4] * 8


def test_squared_relu_halves_the_exponent():
    """After a squared ReLU the columns are multiplied by the square of the factor."""
    squares = squares_of(6, -2, 3)
    assert block_factors(squares, 0.5)[:4].tolist() == [8.0, 0.5, 2.0, 1.0]
    assert block_factors(squares, 0.5, power=2)[:4].tolist() == [2.0, 0.5, 2.0, 1.0]


def quantized_error(x: torch.Tensor, weight: torch.Tensor) -> float:
    def fake_quant(t):
        return nvfp4.fake_quant(t, nvfp4.global_scale_from_amax(t.abs().max()))

    exact = x @ weight.T
    return ((fake_quant(x) @ fake_quant(weight).T - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_smoothing_reduces_the_error_and_keeps_the_product(dtype):
    torch.manual_seed(0)
    rows, columns = (torch.randn(128, 32) / 32**0.5).to(dtype), (torch.randn(48, 128) / 128**0.5).to(dtype)
    rows[5::16] *= 32
    columns[:, 5::16] /= 32  # outliers with small weights, as after a norm with a large weight
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


def test_too_few_tokens_leave_the_weights_unchanged():
    rows, columns = torch.randn(16, 4), torch.randn(8, 16)
    pair = SmoothingPair("expert", [rows], [columns], watch=None, min_tokens=16)
    pair.observe(torch.randn(15, 16) * squares_of(8).float())
    before = rows.clone(), columns.clone()
    assert pair.apply_(0.5).tolist() == [1.0] * 16
    assert torch.equal(rows, before[0]) and torch.equal(columns, before[1])


def test_nan_error_names_the_linear():
    pair = SmoothingPair("decoder.layers.1.mlp.linear_fc2", [torch.ones(16, 4)], [torch.ones(8, 16)], watch=None)
    pair.observe(torch.full((4, 16), torch.nan))
    with pytest.raises(QADError, match=r"layers\.1\.mlp\.linear_fc2 contains NaN or Inf"):
        pair.apply_(0.5)
