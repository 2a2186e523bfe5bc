"""Exact packing of fake-quantized weights and recovery of their global scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.block_scales import SCALE_RULES, amax_of
from megatron_qad.formats.common import MAX_ULPS
from megatron_qad.formats.e2m1 import E2M1_VALUES, pack_codes, round_to_e2m1_, unpack_codes
from megatron_qad.formats.nvfp4 import dequantize, fake_quant, global_scale_from_amax, quantize, tensor_amax
from megatron_qad.formats.nvfp4_exact import ExactEncoder
from megatron_qad.formats.nvfp4_format import NVFP4
from megatron_qad.formats.nvfp4_pack import (
    NotRepresentableError,
    is_representable,
    pack_representable,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def spread_weight(seed, dtype, rows=16, dim=128, exponent=0, spread=4.0):
    """Return rows of very different magnitudes, so that block scales include the subnormal E4M3 numbers."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(rows, 1, generator=generator) * spread)
    weight = (torch.randn(rows, dim, generator=generator) * sizes).clamp(-3e4, 3e4)  # float16 ends at 65504
    return (weight * 2.0**exponent).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-12, 0),
    spread=st.floats(0, 6),
)
def test_fake_quantized_weight_packs_exactly(seed, dtype, exponent, spread):
    weight = spread_weight(seed, dtype, exponent=exponent, spread=spread)
    quantized = fake_quant(weight, global_scale_from_amax(tensor_amax(weight)))
    scale = NVFP4.pack([quantized], name="w")[0]
    packed, block_scale = pack_representable(quantized, scale)
    assert torch.equal(bits(dequantize(packed, block_scale, scale, dtype)), bits(quantized))
    assert (block_scale.view(torch.uint8) >= 1).all() and (block_scale.view(torch.uint8) <= 0x7E).all()


GRID = torch.tensor(E2M1_VALUES[:8])
SCALES = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-126, -40, -17, -4, 0])
def test_representable_block_gets_smallest_exact_scale(dtype, exponent):
    """Compare the search, which tries seven candidates, with trying all 126 scales.

    Covers every E4M3 scale with every largest code and several global scales. In float16, small exponents make values
    subnormal or zero.
    """
    if dtype == torch.float16 and exponent < -17:
        pytest.skip("all values round to zero in float16")
    generator = torch.Generator().manual_seed(exponent)
    for mantissa in (1.0, 1.1, 1.3333333, 1.9999999):
        scale = torch.tensor(mantissa) * 2.0**exponent
        codes = torch.randint(0, 8, (126, 7, 16), generator=generator)
        codes = codes.minimum(torch.arange(1, 8).view(1, 7, 1))
        codes[..., 0] = torch.arange(1, 8)
        signs = torch.randint(0, 2, codes.shape, generator=generator) * 2.0 - 1
        values = GRID[codes] * signs * (SCALES.float() * scale).view(-1, 1, 1)
        blocks = values.to(dtype).view(-1, 16).add_(0.0)
        packed, found = pack_representable(blocks, scale)
        assert torch.equal(bits(dequantize(packed, found, scale, dtype)), bits(blocks))
        decode_scales = SCALES.float() * scale
        exact = torch.stack(
            [((round_to_e2m1_(blocks.float() / s) * s).to(dtype) == blocks).all(-1) for s in decode_scales]
        )
        smallest = SCALES.float()[exact.int().argmax(0)]
        amax, zero = blocks.abs().amax(-1).float(), (blocks == 0).all(-1)
        normal = amax >= torch.finfo(dtype).tiny  # for other blocks many scales decode alike
        assert torch.equal(found.float().view(-1)[normal], smallest[normal])
        assert (found.float().view(-1)[zero] == 1).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-100, 20), dtype=st.sampled_from(DTYPES[:2]))
def test_random_codes_decode_and_pack_exactly(seed, exponent, dtype):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (8, 32), generator=generator, dtype=torch.uint8)
    assert torch.equal(pack_codes(unpack_codes(packed)), packed)
    block_scale = SCALES.view(torch.uint8)[torch.randint(0, 126, (8, 4), generator=generator)].view(torch.float8_e4m3fn)
    scale = (1 + torch.rand((), generator=generator)) * 2.0**exponent
    values = dequantize(packed, block_scale, scale, dtype)
    assert torch.equal(dequantize(*pack_representable(values, scale), scale, dtype), values)


def test_quantizing_again_differs_for_subnormal_block_scale():
    """This case makes the search of pack_representable necessary."""
    scale = torch.tensor(1.0)
    weight = torch.zeros(1, 16)
    weight[0, :3] = (
        torch.tensor([6 * 1.6, 1.0, -3.0]) * 2.0**-9
    )  # ideal scale 1.6 * 2^-9, rounded to 2 * 2^-9, codes up to 4
    quantized = fake_quant(weight, scale)
    assert quantized[0, 0] == 8 * 2.0**-9
    assert not torch.equal(dequantize(*quantize(quantized, scale), scale), quantized)
    packed, block_scale = pack_representable(quantized, scale)
    assert block_scale.view(torch.uint8).item() == 0x02
    assert torch.equal(dequantize(packed, block_scale, scale), quantized)


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_recovers_its_shared_scale(dtype):
    for seed in range(20):
        group = [spread_weight(seed, dtype), spread_weight(seed + 100, dtype) * 0.1, torch.zeros(4, 128, dtype=dtype)]
        amax = torch.stack([tensor_amax(w) for w in group]).amax()
        original = global_scale_from_amax(amax)
        group = [fake_quant(w, original) for w in group]
        scale = NVFP4.pack(group, name="qkv")[0]
        for weight in group:
            assert torch.equal(bits(dequantize(*pack_representable(weight, scale), scale, dtype)), bits(weight))
        if dtype != torch.float32:
            assert torch.equal(scale, original)


@pytest.mark.parametrize("rule", ["max", "four_over_six"])
def test_recomputed_float32_scale_differs_by_at_most_one_ulp(rule):
    """Try all 2^23 mantissas: this bound limits the search to neighbours. Exponents above the scale's minimum only
    shift the values."""
    num_moved, names = 0, ["w"] * (1 << 20)
    for part in torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).split(1 << 20):
        scale = NVFP4.scales_from_amaxes(part.view(torch.float32), names, rule)
        # The amax of a fake-quantized tensor has code 6 and block scale 448, or 6 and 256, or 4 and 384.
        amax = 6 * ((448 if rule == "max" else 256) * scale)
        assert rule == "max" or torch.equal(amax, 4 * (384 * scale))
        again = NVFP4.scales_from_amaxes(amax, names, rule)
        ulps = (scale.view(torch.int32) - again.view(torch.int32)).abs()
        assert ulps.max() <= MAX_ULPS
        num_moved += int(ulps.sum())
    # Under max, packing needs to try neighbours. Under four_over_six the amax can move by an ulp, but not the scale.
    assert (num_moved > 0) == (rule == "max")


def test_amax_of_16_bit_dtypes_is_recovered_exactly():
    """All mantissas of float16, which contain those of bfloat16."""
    amax = torch.arange(1024, 2048).float() / 1024
    for rule in (rule for rule in SCALE_RULES if SCALE_RULES[rule].is_searched):
        scale = NVFP4.scales_from_amaxes(amax, ["w"] * 1024, rule)
        assert torch.equal(amax_of(scale, rule, torch.float16), amax), rule
    assert torch.equal(6 * (256 * NVFP4.scales_from_amaxes(amax, ["w"] * 1024, "four_over_six")), amax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["mse_multipliers", "mse_sweep"])
def test_rules_that_change_the_amax_pack_with_it(rule, dtype):
    weight, changed = spread_weight(3, dtype), 0
    for part in weight.split(1):
        amax = tensor_amax(part)
        scale = NVFP4.scale_from_amax(amax, rule=rule)
        quantized = fake_quant(part, scale, rule=rule)
        found, (codes,) = NVFP4.pack([quantized], name="w", amax=amax, rule=rule)
        assert torch.equal(found, scale)
        assert torch.equal(NVFP4.dequantize(codes, scale, dtype), quantized)
        changed += tensor_amax(quantized) != amax
        with pytest.raises(QADError, match=rf"^layers\.1\.w: its amax is missing.*{rule}.*Store the amax"):
            NVFP4.pack([quantized], name="layers.1.w", rule=rule)
    assert changed  # otherwise the amax could be recovered
    scale, codes = NVFP4.pack([weight], name="w", amax=tensor_amax(weight), rule=rule)  # not quantized yet
    assert codes is None and torch.equal(scale, NVFP4.scale_from_amax(tensor_amax(weight), rule=rule))


def test_given_amax_finds_the_scale_of_float32_weights_at_once():
    for seed in range(20):
        weight = spread_weight(seed, torch.float32)
        scale = NVFP4.scale_from_amax(tensor_amax(weight), rule="four_over_six")
        quantized = fake_quant(weight, scale, rule="four_over_six")
        found, codes = NVFP4.pack([quantized], name="w", amax=tensor_amax(weight), rule="four_over_six")
        assert codes is not None and torch.equal(found, scale)


def test_four_over_six_weights_of_earlier_versions_are_packed():
    """Their global scale was amax / 2688; any block scales occur with it."""
    weight = spread_weight(0, torch.bfloat16)
    scale = global_scale_from_amax(tensor_amax(weight))
    quantized = fake_quant(weight, scale, rule="mse")
    found, (codes,) = NVFP4.pack([quantized], name="w", rule="four_over_six")
    assert torch.equal(found, scale)
    assert torch.equal(NVFP4.dequantize(codes, found, torch.bfloat16), quantized)


def test_unrepresentable_weight_error_has_name_and_count():
    weight = torch.randn(8, 64)
    scale = global_scale_from_amax(tensor_amax(weight))
    quantized = fake_quant(weight, scale)
    quantized[3, 20:40] *= 1.01
    with pytest.raises(QADError, match=r"model\.w: at least 2 of the first 32 blocks"):
        pack_representable(quantized, scale, name="model.w")
    assert not is_representable(quantized, scale)
    with pytest.raises(NotRepresentableError, match=r"model\.w"):
        pack_representable(weight, scale, name="model.w")


def test_all_zero_weight_packs():
    weight = torch.zeros(4, 32, dtype=torch.bfloat16)
    scale = NVFP4.pack([weight], name="w")[0]
    packed, block_scale = pack_representable(weight, scale)
    assert scale == 1.0 and packed.sum() == 0 and (block_scale.view(torch.uint8) == 0x38).all()


def test_packed_bytes_equal_those_of_quantize():
    """For normal weights, codes and block scales are the original ones, except for the sign of zero."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = global_scale_from_amax(tensor_amax(weight))
    packed, block_scale = quantize(weight, scale)
    again, again_scale = pack_representable(fake_quant(weight, scale), scale)
    assert torch.equal(block_scale.view(torch.uint8), again_scale.view(torch.uint8))
    low, high = packed & 0x0F, packed >> 4
    plus_zero = torch.where(low == 8, 0, low) | torch.where(high == 8, 0, high) << 4
    assert torch.equal(plus_zero, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_that_its_own_scale_represents_has_the_codes_of_quantize(dtype):
    weight = spread_weight(0, dtype, spread=1.0)
    scale = global_scale_from_amax(tensor_amax(weight))
    weight = fake_quant(weight, scale)
    packed, block_scale = quantize(weight, scale)
    exact = (dequantize(packed, block_scale, scale, dtype) == weight).view(-1, 16).all(-1)
    assert exact.float().mean() > 0.9
    found, found_scale = pack_representable(weight, scale)
    assert torch.equal(found.view(-1, 8)[exact], packed.view(-1, 8)[exact])
    assert torch.equal(found_scale.view(torch.uint8).view(-1)[exact], block_scale.view(torch.uint8).view(-1)[exact])


@pytest.mark.parametrize("decode_scale", [1.0, 1.1, 0.007, 1.9 * 2.0**-100, 1.5 * 2.0**-130])
def test_exact_encoder_accepts_the_values_of_the_grid_and_no_other(decode_scale):
    """Try all finite bfloat16 numbers; a block holds one number, zeros, and a negative zero."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()]
    blocks = torch.zeros(len(values), 16, dtype=torch.bfloat16)
    blocks[:, 5], blocks[:, 9] = values, -0.0
    scale = torch.full((len(values), 1), decode_scale)
    packed, wrong = ExactEncoder(len(values), torch.bfloat16, blocks.device).encode(blocks, blocks.float(), scale)
    codes = unpack_codes(packed)
    grid = (torch.tensor(E2M1_VALUES) * scale[0]).bfloat16()
    on_grid = torch.isin(values, grid + 0.0)
    exact = torch.ones(len(values), dtype=torch.bool).index_fill(0, wrong, False)
    assert on_grid.sum() >= 9 and torch.equal(exact, on_grid)
    assert torch.equal(grid[codes[exact, 5].int()], values[exact])
    assert not codes[exact][values[exact] == 0].any() and not codes[:, 9].any()
