"""NVFP4 with given block scales: equal to quantizing with the rule, saturation, the weighted search, and errors."""

import pytest
import torch

from megatron_qad.engine.errors import QADError
from megatron_qad.formats.common import tensor_amax
from megatron_qad.formats.nvfp4_format import NVFP4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = ["max", "four_over_six", "mse", "mse_sweep"]


def made(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 40, 64, generator=generator) * torch.exp(torch.randn(3, 40, 1, generator=generator))
    x[0, 0], x[1, :, 16:32] = 0.0, -0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_scales_of_a_rule_give_the_result_of_the_rule(rule, dtype):
    x = made(dtype)
    scale = NVFP4.scale_from_amax(tensor_amax(x), rule=rule)
    scales = NVFP4.block_scales(x, scale, rule=rule)
    expected = NVFP4.quantize(x, scale, rule=rule)
    assert torch.equal(scales.view(torch.uint8), expected["block_scale"].view(torch.uint8))
    codes = NVFP4.quantize_fixed(x, scale, scales)
    assert torch.equal(codes["weight"], expected["weight"])
    fixed = NVFP4.fake_quant_fixed(x, scale, scales)
    assert fixed.dtype == dtype and torch.equal(fixed, NVFP4.rounded(x, scale, name="x", rule=rule))
    assert torch.equal(fixed, NVFP4.dequantize(codes, scale, dtype))
    assert not torch.signbit(fixed[fixed == 0]).any()


def test_later_values_saturate_at_the_first_scales():
    x = made()
    scale = NVFP4.scale_from_amax(tensor_amax(x))
    scales = NVFP4.block_scales(x, scale)
    grown = NVFP4.fake_quant_fixed(3 * x, scale, scales)
    largest = 6 * (scales.float() * scale).repeat_interleave(16, dim=-1)
    assert (grown.abs() <= largest).all() and (grown.abs() == largest).any()
    assert torch.equal(grown, NVFP4.dequantize(NVFP4.quantize_fixed(3 * x, scale, scales), scale, x.dtype))
    shrunk = NVFP4.fake_quant_fixed(x / 64, scale, scales)  # below a quarter of the scale
    assert not shrunk.any()
    none = torch.zeros_like(scales)
    assert not NVFP4.fake_quant_fixed(x, scale, none).any()


def test_hessian_weights_the_error():
    """With an identity the choice is that of mse_sweep; if one input dominates, its weights have the least error."""
    x = made()[2]
    scale = NVFP4.scale_from_amax(tensor_amax(x), rule="local_hessian")
    identity = torch.eye(16).repeat(4, 1, 1)
    same = NVFP4.block_scales(x, scale, rule="local_hessian", hessian=identity)
    # Equal up to the order of additions, which decides only if two candidates have nearly the same error.
    sweep = NVFP4.block_scales(x, scale, rule="mse_sweep")
    assert (same.float() == sweep.float()).float().mean() > 0.95
    dominant = torch.full((16,), 1e-3)
    dominant[5] = 1.0
    weighted = NVFP4.block_scales(x, scale, rule="local_hessian", hessian=torch.diag(dominant).repeat(4, 1, 1))

    def error(scales):
        difference = (NVFP4.fake_quant_fixed(x, scale, scales) - x).view(-1, 16)
        return difference.square().sum(0)

    # Measured: 0.13 of it.
    assert error(weighted)[5] < error(sweep)[5] / 5 and error(weighted).sum() > error(sweep).sum()


def test_errors_name_the_tensor_and_what_is_expected():
    x = made()[0]
    scale = NVFP4.scale_from_amax(tensor_amax(x))
    scales = NVFP4.block_scales(x, scale)
    with pytest.raises(QADError, match=r"^a\.w: its block scales have shape \[40, 3\].*expected \[40, 4\]"):
        NVFP4.fake_quant_fixed(x, scale, scales[:, :3], name="a.w")
    with pytest.raises(QADError, match=r"^a\.w: its block scales have .*float32, expected .*float8_e4m3fn"):
        NVFP4.quantize_fixed(x, scale, scales.float(), name="a.w")
    for hessian, found in ((None, "missing"), (torch.zeros(3, 16, 16), r"torch\.float32 \[3, 16, 16\]")):
        with pytest.raises(QADError, match=rf"^a\.w: its Hessian is {found}, expected .*\[4, 16, 16\]"):
            NVFP4.block_scales(x, scale, name="a.w", rule="local_hessian", hessian=hessian)
    with pytest.raises(QADError, match=r"^a\.w: the rule local_hessian needs a Hessian"):
        NVFP4.quantize(x, scale, name="a.w", rule="local_hessian")
    with pytest.raises(QADError, match=r"^a\.w: unknown NVFP4 scale rule 'median'"):
        NVFP4.block_scales(x, scale, name="a.w", rule="median")
    x[3, 5] = torch.nan
    for call in (NVFP4.fake_quant_fixed, NVFP4.quantize_fixed):
        with pytest.raises(QADError, match=r"^a\.w: 1 of 2560 values"):
            call(x, scale, scales, name="a.w")
