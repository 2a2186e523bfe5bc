"""FP8 E4M3 with scales per tensor and per row: modelopt codes, exact packing, recovered scales, invalid input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import common, fp8
from megatron_qad.formats.common import NotRepresentableError, tensor_amax
from megatron_qad.formats.fp8_format import FP8

ONE = torch.tensor(1.0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def scale_of(x, per_row=False):
    return fp8.scale_from_amax(fp8.row_amax(x) if per_row else tensor_amax(x))


def awkward(seed, dtype=torch.float32, exponent=0, rows=12, dim=80):
    """Return zeros of both signs, a zero row, multiples of 1/16 (ties), subnormal codes, rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator) * torch.exp(2 * torch.randn(rows, 1, generator=generator))
    x[0], x[1, ::3], x[2, 1::4] = 0.0, -0.0, 1e-7
    x[3] = torch.randint(-448, 449, (dim,), generator=generator) / 16
    return (x * 2.0**exponent).clamp(-6e4, 6e4).to(dtype)


def test_codes_decode_to_their_values_and_ties_round_to_even():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~codes.float().isnan()]
    values = fp8.dequantize(codes, ONE)
    assert torch.equal(values, codes.float()) and not torch.signbit(values[values == 0]).any()
    assert torch.equal(fp8.fake_quant(values, ONE), values)
    positive = values[values >= 0].unique()
    ties = (positive[:-1] + positive[1:]) / 2
    even = torch.where(torch.arange(len(ties)) % 2 == 0, positive[:-1], positive[1:])
    assert torch.equal(fp8.fake_quant(ties, ONE), even)
    assert torch.equal(fp8.fake_quant(-ties, ONE), -even)
    assert fp8.fake_quant(torch.tensor([464.0, 465.0, 1e30, -1e30]), ONE).tolist() == [448, 448, 448, -448]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-60, 60), per_row=st.booleans())
def test_codes_and_scales_equal_modelopt_exporter(seed, exponent, per_row):
    modelopt_tensor = pytest.importorskip("modelopt.torch.quantization.qtensor").FP8QTensor
    x = awkward(seed, exponent=exponent)
    if per_row:
        x[0, 0] = 1.0  # modelopt gives a zero row the scale 0 and NaN codes
    quantized, scale = modelopt_tensor.quantize(x, axis=0 if per_row else None)
    assert torch.equal(scale.view(-1), scale_of(x, per_row).view(-1))
    codes = fp8.quantize(x, scale)
    assert torch.equal(codes.view(torch.uint8), quantized._quantized_data.view(torch.uint8))
    assert torch.equal(fp8.dequantize(codes, scale), quantized.dequantize(torch.float32, scale=scale))


def test_modelopt_fake_quant_differs_only_in_ties_and_last_bits():
    """modelopt's training kernel multiplies by a rounded 448/amax, while its exporter and our code divide. A quotient
    near a tie may therefore round to the other side, and the product with 1/scale has one more rounding."""
    eager = pytest.importorskip("modelopt.torch.quantization.tensor_quant").fp8_eager
    num_flips = num_values = 0
    for seed in range(20):
        x = awkward(seed, torch.bfloat16).float()
        scale = scale_of(x)
        ours, peer = fp8.fake_quant(x, scale), eager(x, tensor_amax(x))
        # The reciprocal, its inverse and the product round three times, ours once.
        flipped = (ours - peer).abs() > 4 * 2.0**-24 * ours.abs()
        quotient = x[flipped] / scale
        code = fp8.quantize(x, scale).float()[flipped]
        peer_code = peer[flipped] / scale
        middle = (code + peer_code) / 2
        assert ((quotient - middle).abs() <= 4 * 2.0**-24 * middle.abs()).all()
        num_flips, num_values = num_flips + int(flipped.sum()), num_values + x.numel()
    print(f"{num_flips} of {num_values} values differ by a tie")
    assert num_flips <= 1e-2 * num_values  # short mantissas are at ties more often than random numbers


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-14, 0),
    per_row=st.booleans(),
)
def test_fake_quantized_tensor_packs_exactly_with_recovered_scale(seed, dtype, exponent, per_row):
    x = awkward(seed, dtype, exponent)
    original = scale_of(x, per_row)
    quantized = fp8.fake_quant(x, original)
    scale = original if per_row else FP8.pack([quantized], name="w")[0]
    assert torch.equal(fp8.dequantize(fp8.pack_representable(quantized, scale), scale, dtype), quantized)
    assert torch.equal(
        fp8.fake_quant(quantized, scale), quantized
    )  # idempotent, unlike NVFP4, because no block scale is chosen again
    if dtype == torch.bfloat16:
        assert torch.equal(scale, original)
    assert not torch.signbit(quantized[quantized == 0]).any()


def test_recomputed_float32_scale_differs_by_at_most_one_ulp():
    """Try all 2^23 mantissas of an amax: this bound limits the search to neighbours."""
    for part in torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).split(1 << 20):
        scale = fp8.scale_from_amax(part.view(torch.float32))
        again = fp8.scale_from_amax(448 * scale)
        assert (scale.view(torch.int32) - again.view(torch.int32)).abs().max() <= common.MAX_ULPS


def test_negative_value_that_dtype_rounds_to_zero_has_no_sign():
    x, scale = torch.tensor([-1.0, 1.0]).half(), torch.tensor(1e-12)  # saturates at 4.48e-10, below float16
    for zero in (fp8.fake_quant(x, scale), fp8.dequantize(fp8.quantize(x, scale), scale, torch.float16)):
        assert zero.tolist() == [0, 0] and not torch.signbit(zero).any()


def test_group_recovers_its_shared_scale():
    group = [awkward(1, torch.bfloat16), awkward(2, torch.bfloat16) * 0.125]
    scale = fp8.scale_from_amax(torch.stack([tensor_amax(w) for w in group]).amax())
    group = [fp8.fake_quant(w, scale) for w in group]
    assert torch.equal(FP8.pack(group, name="w")[0], scale)
    assert all(fp8.is_representable(w, scale) for w in group)


def test_scales_are_positive_and_finite_for_any_amax():
    amax = torch.tensor([[0.0], [2.0**-149], [1.0], [torch.finfo(torch.float32).max]])
    scale = fp8.scale_from_amax(amax)
    assert scale.shape == (4, 1) and scale[0] == 1.0 and (scale >= fp8.SCALE_MIN).all() and scale.isfinite().all()
    assert fp8.fake_quant(amax, scale).isfinite().all()
    assert fp8.scale_from_amax(torch.tensor(0.0)) == 1.0
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(QADError, match=r"layers\.2\.w: 1 of 2 amaxes"):
            fp8.scale_from_amax(torch.tensor([1.0, bad]), name="layers.2.w")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_error_names_tensor(bad):
    x = torch.randn(4, 24)
    x[2, 5] = bad
    for call in (fp8.quantize, fp8.fake_quant, fp8.fake_quant_, fp8.is_representable):
        with pytest.raises(QADError, match=r"layers\.3\.up_proj: 1 of 96 values.*NaN or Inf"):
            call(x.clone(), ONE, name="layers.3.up_proj")


def test_invalid_shapes_dtypes_and_scales_raise():
    x = torch.randn(4, 24)
    with pytest.raises(QADError, match="float64"):
        fp8.quantize(x.double(), ONE)
    for scale in (torch.ones(3, 1), torch.ones(24), torch.ones(4)):
        with pytest.raises(QADError, match="one scale per tensor or per row"):
            fp8.quantize(x, scale)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(QADError, match="scale_from_amax"):
            fp8.fake_quant(x, torch.tensor(bad))
    with pytest.raises(QADError, match="float8_e4m3fn"):
        fp8.dequantize(x, ONE)


def test_unrepresentable_weight_error_has_name_and_count():
    x = fp8.fake_quant(torch.randn(4, 24), ONE)
    x[1, 3] = 1.01
    with pytest.raises(NotRepresentableError, match=r"model\.w: 1 of 96 values"):
        fp8.pack_representable(x, ONE, name="model.w")


def test_tiles_views_leading_shapes_and_empty_tensors(monkeypatch):
    x = torch.randn(3, 5, 24)
    scale = scale_of(x, per_row=True)
    assert scale.shape == (3, 5, 1)
    whole = fp8.fake_quant(x, scale)
    monkeypatch.setattr(common, "_TILE_ELEMENTS", 2 * 24)
    assert torch.equal(fp8.fake_quant(x, scale), whole)
    assert torch.equal(fp8.dequantize(fp8.quantize(x, scale), scale), whole)
    base = torch.randn(24, 6)
    expected = fp8.fake_quant(base.t().contiguous(), ONE)
    assert torch.equal(fp8.fake_quant_(base.t(), ONE), expected) and torch.equal(base.t(), expected)
    assert fp8.fake_quant(x[:0], ONE).shape == (0, 5, 24)
    assert scale_of(x[:0]) == 1.0
