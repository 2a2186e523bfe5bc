"""INT4 arithmetic against modelopt's fake quantizer and compressed-tensors' packing and decompression."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import int4
from megatron_qad.formats.format_registry import FORMATS

STORED = FORMATS["int4-w4a16"].stored["compressed-tensors"]
DTYPES = [torch.bfloat16, torch.float32]


def weight_of(seed: int, dtype: torch.dtype, rows: int = 16, dim: int = 256, spread: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows_of = torch.exp2(spread * torch.randn(rows, 1, generator=generator))
    return (torch.randn(rows, dim, generator=generator) * rows_of).to(dtype)


def fake_quant(weight: torch.Tensor) -> torch.Tensor:
    return int4.dequantize(*int4.quantize(weight), weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_modelopt_where_the_scale_is_a_bf16_number(dtype):
    weight = weight_of(0, dtype, spread=0)
    # Each group's amax is 7 times a power of two, so that modelopt's float32 scale and our BF16 one are equal.
    weight.unflatten(-1, (-1, 128))[..., 0] = 7 * 2.0 ** torch.randint(0, 4, (16, 2)).to(dtype)
    config = {"num_bits": 4, "block_sizes": {-1: 128}, "type": "dynamic", "enable": True}
    modelopt = TensorQuantizer(QuantizerAttributeConfig(**config))(weight)
    assert torch.equal(fake_quant(weight), modelopt)


def test_the_difference_from_modelopt_is_the_rounding_of_the_scale():
    """The figures of the module's docstring, with amaxes of all mantissas."""
    weight = weight_of(4, torch.bfloat16, rows=2048, dim=1024, spread=1.0)
    config = {"num_bits": 4, "block_sizes": {-1: 128}, "type": "dynamic", "enable": True}
    modelopt = TensorQuantizer(QuantizerAttributeConfig(**config))(weight).unflatten(-1, (-1, 128)).float()
    codes, scales = int4.quantize(weight)
    groups, codes, scales = (
        weight.unflatten(-1, (-1, 128)),
        codes.unflatten(-1, (-1, 128)),
        scales.unsqueeze(-1).float(),
    )
    amax = groups.abs().amax(-1, keepdim=True).float()
    assert ((scales * 7 / amax - 1).abs() <= 2**-8).all()
    unrounded = torch.full_like(amax, 7.0) / amax
    its_codes = (groups.float() * unrounded).round()
    assert torch.equal((its_codes / unrounded).bfloat16().float(), modelopt)
    assert (codes - its_codes).abs().max() == 1 and 0.001 < (codes != its_codes).float().mean() < 0.004
    errors = [(values.double() - groups).square().mean() for values in (int4.fake_quant_(groups.clone()), modelopt)]
    assert errors[0] / errors[1] == pytest.approx(1, abs=1e-3)
    served = (its_codes * scales).bfloat16().float()
    assert 0.05 < (served != modelopt).float().mean() < 0.07
    # A unit in the last place is at most 2^-7 of a value; two of them occur only where they are smaller.
    assert ((served - modelopt).abs() <= 2**-7 * modelopt.abs()).all()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([*DTYPES, torch.float16]), spread=st.floats(0, 3))
def test_fake_quantization_in_place_is_quantize_and_dequantize(seed, dtype, spread):
    """In tiles, bit for bit with the sign of zeros, also where the tensor is not contiguous."""
    weight = weight_of(seed, dtype, spread=spread)
    expected, copy, transposed = fake_quant(weight), weight.clone(), weight.T.contiguous().T
    assert int4.fake_quant_(copy) is copy and int4.fake_quant_(transposed) is transposed
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    for found in (copy, transposed.contiguous()):
        assert torch.equal(found.view(bits), expected.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_weights_stay_finite(dtype):
    weight = torch.linspace(-1, 1, 128).mul(3.38e38).to(dtype)
    quantized = fake_quant(weight)
    assert quantized.isfinite().all() and int4.exact_codes(quantized) is not None


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES), spread=st.floats(0, 12))
def test_a_fake_quantized_weight_packs_to_itself(seed, dtype, spread):
    quantized = fake_quant(weight_of(seed, dtype, spread=spread))
    codes, scales = int4.exact_codes(quantized)
    assert torch.equal(int4.dequantize(codes, scales, dtype), quantized)


def test_every_bf16_scale_is_found_again():
    """All mantissas of a scale: a seventh of BF16's 7 * scale can be the neighbour of the scale."""
    scales = (1 + torch.arange(128) / 128).repeat_interleave(2)  # the top code is 7 in one row, -7 in the next
    codes = torch.randint(-6, 7, (256, 128), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[::2, 5], codes[1::2, 5] = 7, -7
    weight = int4.dequantize(codes, scales[:, None].bfloat16(), torch.bfloat16)
    found = int4.exact_codes(weight)
    assert torch.equal(int4.dequantize(*found, torch.bfloat16), weight)
    assert (found[0] == codes).all()


def test_a_weight_that_was_not_quantized_has_no_codes():
    weight = weight_of(1, torch.bfloat16)
    assert int4.exact_codes(weight) is None
    moved = fake_quant(weight)
    moved[3, 130] *= 1.01
    assert int4.exact_codes(moved) is None


def test_packing_is_compressed_tensors():
    codes = torch.randint(-8, 8, (16, 256), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    packed = int4.pack_codes(codes)
    assert torch.equal(packed, pack_to_int32(codes, 4)) and torch.equal(int4.unpack_codes(packed), codes)
    assert torch.equal(unpack_from_int32(packed, 4, codes.shape), codes)


def test_compressed_tensors_decompresses_what_was_trained():
    quantized = fake_quant(weight_of(3, torch.bfloat16))
    codes = FORMATS["int4-w4a16"].weight.pack_representable(quantized, torch.ones(()), name="w")
    state = {STORED.parts[role][0]: tensor for role, tensor in codes.items()}
    entry = {key: value for key, value in STORED.group.items() if key != "format"}
    scheme = QuantizationScheme(targets=["Linear"], **entry)
    assert torch.equal(PackedQuantizationCompressor.decompress(state, scheme)["weight"], quantized)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_tiny_groups(dtype):
    weight = torch.zeros(2, 128, dtype=dtype)
    weight[1, 3] = 2.0**-130  # below the smallest scale: rounds to zero
    codes, scales = int4.quantize(weight)
    assert not codes.any() and scales.float().eq(int4.SCALE_MIN).all()
    assert int4.exact_codes(torch.zeros(2, 128, dtype=dtype)) is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_by_name(bad):
    weight = torch.ones(2, 256)
    weight[1, 200] = bad
    for function in (int4.quantize, int4.exact_codes):
        with pytest.raises(QADError, match=r"layer\.weight: 1 of 512 values .* NaN or Inf"):
            function(weight, name="layer.weight")


def test_columns_must_fill_groups():
    with pytest.raises(QADError, match=r"layer\.weight: shape \[2, 192\]; INT4 needs .* multiple of 128"):
        int4.quantize(torch.ones(2, 192), name="layer.weight")
