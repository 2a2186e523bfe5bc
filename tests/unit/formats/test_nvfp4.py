"""NVFP4 arithmetic against its definition: values, ties, limits of both scales, invalid input, shapes and dtypes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import common, nvfp4
from megatron_qad.formats.nvfp4 import (
    dequantize,
    fake_quant,
    fake_quant_,
    global_scale_from_amax,
    quantize,
    tensor_amax,
)

ONE = torch.tensor(1.0)


def scale_of(x):
    return global_scale_from_amax(tensor_amax(x))


def block_with(values, amax=6.0):
    """Return one block [1, 16]. Amax 6 gives the block scale 1 under the global scale 1."""
    return torch.tensor([[amax, *values] + [0.0] * (15 - len(values))])


def test_ties_round_to_even_code_and_values_saturate():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert fake_quant(block_with(ties), ONE)[0, 1:8].tolist() == expected
    assert fake_quant(block_with([-t for t in ties]), ONE)[0, 1:8].tolist() == [-v for v in expected]
    just_above = torch.nextafter(torch.tensor(ties), torch.full((7,), 10.0)).tolist()
    assert fake_quant(block_with(just_above), ONE)[0, 1:8].tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    # The block scale saturates at 448, so 1e6 under a global scale of 1 becomes 6 * 448.
    assert fake_quant(block_with([], amax=1e6), ONE)[0, 0] == 2688


def test_codes_decode_to_their_values_and_low_nibble_is_even_column():
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    scale = torch.ones(1, 1).to(torch.float8_e4m3fn)
    values = dequantize(packed, scale, ONE)[0]
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.signbit(values).sum() == 7  # code 8, -0.0, decodes to +0.0
    codes = nvfp4.unpack_codes(packed)
    assert codes.tolist() == [list(range(16))]
    assert torch.equal(nvfp4.pack_codes(codes), packed)


def test_zero_blocks_and_zero_tensors_get_scale_one():
    x = torch.zeros(2, 32)
    x[0, 0] = 6.0
    packed, block_scale = quantize(x, scale_of(x))
    assert block_scale.view(torch.uint8).tolist() == [[0x7E, 0x38], [0x38, 0x38]]
    zero = torch.zeros(4, 16)
    assert scale_of(zero) == 1.0
    packed, block_scale = quantize(zero, scale_of(zero))
    assert packed.sum() == 0 and dequantize(packed, block_scale, scale_of(zero)).eq(0).all()


def test_tiny_blocks_get_smallest_scale():
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 2688.0, 2.0**-9 * 3  # the ideal scale of the second block is half of 2^-9
    _, block_scale = quantize(x, ONE)
    assert block_scale.view(torch.uint8).tolist() == [[0x7E, 0x01]]
    assert fake_quant(x, ONE)[0, 16] == 2.0**-9 * 3


def test_minus_zero_and_negative_underflow_decode_to_plus_zero():
    x = block_with([-0.0, -0.1])
    packed, block_scale = quantize(x, ONE)
    assert nvfp4.unpack_codes(packed)[0, 1:3].tolist() == [
        0,
        8,
    ]  # as modelopt: -0.0 is code 0, a small negative is code 8
    assert not torch.signbit(fake_quant(x, ONE)).any()
    assert not torch.signbit(dequantize(packed, block_scale, ONE)).any()
    tiny = torch.full((1, 16), -1e-8)  # float16 rounds this value to zero
    tiny[0, 0] = 6e-8
    packed, block_scale = quantize(tiny, scale_of(tiny))
    assert (nvfp4.unpack_codes(packed)[0, 1:] > 8).all()
    assert not torch.signbit(dequantize(packed, block_scale, scale_of(tiny), torch.float16)).any()
    saturated = fake_quant(torch.full((1, 16), -1.0).half(), torch.tensor(1e-14))  # -2.7e-11, below float16
    assert not saturated.any() and not torch.signbit(saturated).any()


@pytest.mark.parametrize("amax", [2.0**-149, 1e-40, 1e-36, torch.finfo(torch.float32).max])
def test_extreme_amax_gives_finite_scales_and_values(amax):
    x = torch.zeros(1, 16)
    x[0, 0] = amax
    scale = scale_of(x)
    assert torch.isfinite(scale) and scale >= nvfp4.GLOBAL_SCALE_MIN and torch.isfinite(1 / scale)
    assert torch.isfinite(fake_quant(x, scale)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_error_names_tensor(bad):
    x = torch.randn(4, 32)
    x[2, 5] = bad
    for call in (quantize, fake_quant, fake_quant_):
        with pytest.raises(QADError, match=r"layers\.3\.up_proj.*NaN or Inf"):
            call(x.clone(), ONE, name="layers.3.up_proj")
    with pytest.raises(QADError, match=r"layers\.3\.up_proj"):
        global_scale_from_amax(tensor_amax(x), name="layers.3.up_proj")


def test_invalid_shapes_dtypes_and_scales_raise():
    for x in (torch.zeros(2, 24), torch.zeros(()), torch.zeros(2, 0)):
        with pytest.raises(QADError, match="multiple of 16"):
            quantize(x, ONE)
    with pytest.raises(QADError, match="float64"):
        quantize(torch.zeros(1, 16, dtype=torch.float64), ONE)
    for bad in (0.0, -1.0, float("nan"), float("inf"), 2.0**-127):
        with pytest.raises(QADError, match="global scale"):
            fake_quant(torch.ones(1, 16), torch.tensor(bad))
    packed, block_scale = quantize(torch.ones(2, 32), ONE)
    with pytest.raises(QADError, match="shape"):
        dequantize(packed, block_scale[:1], ONE)
    with pytest.raises(QADError, match="float8_e4m3fn"):
        dequantize(packed, block_scale.view(torch.uint8), ONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quant_equals_quantize_dequantize_for_any_leading_shape(dtype):
    x = torch.randn(3, 5, 48).to(dtype)
    scale = scale_of(x)
    packed, block_scale = quantize(x, scale)
    assert packed.shape == (3, 5, 24) and block_scale.shape == (3, 5, 3)
    decoded = dequantize(packed, block_scale, scale, dtype)
    assert torch.equal(fake_quant(x, scale), decoded)
    # The only rounding is that of the float32 values to the dtype.
    assert torch.equal(dequantize(packed, block_scale, scale).to(dtype), decoded)
    assert fake_quant(x[:0], scale).shape == (0, 5, 48)  # an expert that received no token


def test_tile_size_does_not_change_results(monkeypatch):
    x = torch.randn(37, 64)
    whole = fake_quant(x, scale_of(x)), *quantize(x, scale_of(x))
    monkeypatch.setattr(common, "_TILE_ELEMENTS", 5 * 64)
    tiled = fake_quant(x, scale_of(x)), *quantize(x, scale_of(x))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(whole, tiled, strict=True))
    assert torch.equal(dequantize(*tiled[1:], scale_of(x)), whole[0])


def test_in_place_fake_quant_of_parameter_and_strided_view():
    parameter = torch.nn.Parameter(torch.randn(8, 32))
    expected = fake_quant(parameter, scale_of(parameter))
    pointer = parameter.data_ptr()
    fake_quant_(parameter, scale_of(parameter))
    assert parameter.data_ptr() == pointer and torch.equal(parameter, expected) and parameter.grad_fn is None
    base = torch.randn(32, 8)
    view = base.t()
    expected = fake_quant(view, scale_of(view))
    packed, block_scale = quantize(view, scale_of(view))
    assert torch.equal(dequantize(packed, block_scale, scale_of(view)), expected)
    fake_quant_(view, scale_of(view))
    assert torch.equal(base.t(), expected)


def test_fake_quant_preserves_amax_of_16_bit_dtypes():
    """Export can recompute the global scale for this reason. Covers every seventh number of both, so every mantissa."""
    for dtype, infinity in ((torch.bfloat16, 0x7F80), (torch.float16, 0x7C00)):
        amax = torch.arange(1, infinity, 7, dtype=torch.int16).view(dtype)
        scale = torch.stack([global_scale_from_amax(a) for a in amax])
        out = torch.stack([fake_quant(a.expand(1, 16), s)[0, 0] for a, s in zip(amax, scale, strict=True)])
        assert torch.equal(torch.stack([global_scale_from_amax(a) for a in out]), scale)
        floored = scale == nvfp4.GLOBAL_SCALE_MIN  # below 3.2e-35 the amax may change, but not the scale
        assert torch.equal(out[~floored], amax[~floored])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-90, 90),
    spread=st.floats(0, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_error_is_bounded_and_signs_and_order_are_preserved(seed, exponent, spread, dtype):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp(torch.randn(8, 1, generator=generator) * spread / 4)
    x = (torch.randn(8, 64, generator=generator) * rows * 2.0**exponent).to(dtype)
    scale = scale_of(x)
    out = fake_quant(x, scale).float()
    blocks, out_blocks = x.float().view(-1, 16), out.view(-1, 16)
    block_amax = blocks.abs().amax(-1, keepdim=True)
    # The largest gap of E2M1 is 2 (4 to 6), and half of it is 1/6 of the code range. Saturation from rounding the E4M3
    # scale adds at most 1/16 (half an ulp of 3 mantissa bits), or 2^-10 of the global scale if subnormal. bfloat16 adds
    # 2^-9.
    bound = block_amax * (1 / 6 + 1 / 16 + 2.0**-8) + 6 * 2.0**-10 * scale
    assert ((blocks - out_blocks).abs() <= bound).all()
    assert (out_blocks * blocks >= 0).all()
    order = blocks.argsort(-1)
    assert (out_blocks.gather(-1, order).diff(dim=-1) >= 0).all()
