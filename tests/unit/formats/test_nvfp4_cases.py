"""Named inputs compared with modelopt (bit for bit) and compressed-tensors (values; each difference has a cause)."""

import pytest
import torch

from megatron_qad.formats.nvfp4 import (
    E4M3_MIN,
    dequantize,
    fake_quant,
    global_scale_from_amax,
    quantize,
    tensor_amax,
)
from megatron_qad.formats.nvfp4_format import NVFP4
from megatron_qad.formats.nvfp4_pack import pack_representable

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def normal(factor):
    return torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * factor


def exact_ties():
    """Return all ties of both signs in every block, with block scales 2^-9 to 256 under global scale 1 (amax 2688)."""
    blocks = torch.cat([torch.tensor([6.0]), TIES, -TIES, torch.tensor([-6.0])]).repeat(32, 8)
    scales = 2.0 ** torch.arange(-9, 9).repeat(15)[:256].repeat_interleave(16).view(32, 128)
    x = blocks * scales
    x[0, 0] = 2688.0
    return x


def with_zero_blocks():
    x = normal(1.0)
    x[::2, 16:48] = 0.0
    x[5] = 0.0
    return x


def one_outlier():
    """Return a tensor whose other blocks have ideal scales far below 2^-9, the smallest."""
    x = normal(0.02)
    x[7, 7] = 3e4
    return x


def subnormal_scales():
    """Return blocks whose amaxes decrease by a factor of 1.3, through all subnormal E4M3 numbers and below."""
    return (normal(1.0).view(-1, 16) * 1.3 ** -torch.arange(256.0).view(-1, 1)).view(32, 128)


def minus_zeros():
    x = normal(1.0)
    x[:, ::3] = -0.0
    x[3] = -0.0
    return x


CASES = {
    "normal x 1": normal(1.0),
    "normal x 0.3": normal(0.3),
    "normal x 0.02": normal(0.02),
    "normal x 1e-4": normal(1e-4),
    "normal x 1e4": normal(1e4),
    "exact ties": exact_ties(),
    "zero tensor": torch.zeros(32, 128),
    "zero blocks": with_zero_blocks(),
    "one huge outlier": one_outlier(),
    "subnormal block scales": subnormal_scales(),
    "subnormal values": normal(2.0**-128),  # all zero in float16
    "minus zeros": minus_zeros(),
}
named = pytest.mark.parametrize("case", CASES)
typed = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(case, dtype):
    x = CASES[case].clamp(-6e4, 6e4).to(dtype)
    return x, global_scale_from_amax(tensor_amax(x))


@named
@typed
def test_codes_scales_and_values_equal_modelopt(case, dtype):
    tensor = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    x, scale = made(case, dtype)
    # Both use our global scale: modelopt's is 0 for a zero tensor (then NaN), and below 2^-126 for subnormal values.
    theirs, their_scale, their_global = tensor.quantize(x.clone(), 16, weights_scaling_factor_2=scale)
    if scale != 1.0 and scale > 2.0**-126:
        assert torch.equal(tensor.get_weights_scaling_factor_2(x), scale)
    packed, block_scale = quantize(x, scale)
    assert torch.equal(packed, theirs._quantized_data)
    assert torch.equal(block_scale.view(torch.uint8), their_scale.view(torch.uint8))
    values = theirs.dequantize(dtype=torch.float32, scale=their_scale, double_scale=their_global, block_sizes={-1: 16})
    assert torch.equal(dequantize(packed, block_scale, scale), values)
    assert torch.equal(fake_quant(x, scale), values.to(dtype))  # one rounding, at the end


@named
@typed
def test_values_equal_compressed_tensors_except_ties_and_underflow(case, dtype):
    args = pytest.importorskip("compressed_tensors.quantization.quant_scheme").NVFP4["weights"]
    from compressed_tensors.quantization.lifecycle.forward import dequantize as their_dequantize
    from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    x, scale = made(case, dtype)
    if case == "subnormal values":
        pytest.skip("compressed-tensors' global scale, 2688 / amax, overflows and falls back to 1; all values are zero")
    x = x.float()  # otherwise it takes minima and maxima in the 16-bit dtype
    blocks = x.view(32, 8, 16)
    their_global = generate_gparam(x.min(), x.max())
    their_scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, their_global)
    codes = their_quantize(x, their_scale.float(), zero.float(), args, global_scale=their_global)
    theirs = their_dequantize(codes, their_scale.float(), args=args, global_scale=their_global, dtype=torch.float32)
    theirs = theirs.view(-1, 16)

    packed, block_scale = quantize(x, scale)
    ours = dequantize(packed, block_scale, scale).view(-1, 16)
    block_scale, their_scale = block_scale.float().view(-1, 1), their_scale.float().view(-1, 1)
    amax = x.view(-1, 16).abs().amax(-1, keepdim=True)
    # q * (s / gs) compared with q * (s * s2): the reciprocal, the quotient and the product round half an ulp each.
    differs = (ours - theirs).abs() > 3 * 2.0**-24 * 2 * ours.abs()

    # Cause 1: amax / 6 rounds to the E4M3 number 0. We use the smallest scale; they use 0.125, which makes the block 0.
    # Half of the smallest scale is a tie, which the reciprocal may move.
    underflow = (block_scale == E4M3_MIN) & (their_scale == 0.125) & (amax > 0)
    assert (amax[underflow] <= 6 * scale * E4M3_MIN / 2 * (1 + 4 * 2.0**-24)).all()
    # Cause 2: the reciprocal moves a quotient at a tie of E4M3, so the block's scale differs by one step.
    stepped = (block_scale != their_scale) & ~underflow & (amax > 0)
    codes_apart = block_scale.to(torch.float8_e4m3fn).view(torch.uint8).int()
    codes_apart = codes_apart - their_scale.to(torch.float8_e4m3fn).view(torch.uint8).int()
    assert (codes_apart[stepped].abs() == 1).all()
    # Cause 3: up to four roundings move a scaled value at a tie of E2M1.
    flips = differs & ~underflow & ~stepped
    scaled = (x.view(-1, 16) / (block_scale * scale)).abs()
    distance = (scaled.unsqueeze(-1) - TIES).abs().amin(-1)
    assert (distance[flips] <= 5 * 4 * 2.0**-24).all()

    counts = {"lost": int(underflow.sum()), "stepped": int(stepped.sum()), "flipped": int(flips.sum())}
    print(f"{case}, {dtype}: of 256 blocks {counts['lost']} lost, {counts['stepped']} a step off; "
          f"of 4096 values {counts['flipped']} on the other side of a tie")  # fmt: skip
    assert counts["stepped"] <= 8 and counts["flipped"] <= 64
    loses = {"one huge outlier", "subnormal block scales"}
    assert (counts["lost"] > 0) == (case in loses)


@named
@typed
def test_every_case_packs_exactly(case, dtype):
    x, scale = made(case, dtype)
    quantized = fake_quant(x, scale)
    recovered = NVFP4.pack([quantized], name="w")[0]
    decoded = dequantize(*pack_representable(quantized, recovered), recovered, dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(decoded.view(integer), quantized.view(integer))
