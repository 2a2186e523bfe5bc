"""Tests of the scales of inputs, keys and values: all serving kernels compute the same codes with them.

The forms are our division and those of serving kernels: reciprocals and fused factors (vLLM, FlashInfer, SGLang and
TensorRT-LLM; Transformer Engine; CUTLASS's epilogues), with reciprocals that are exact, or an ulp too small or too
large, as ``rcp.approx`` may return them.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qad.formats import fp8, nvfp4
from megatron_qad.formats.block_scales import max_scale
from megatron_qad.formats.common import E4M3_MIN, round_to_e4m3_
from megatron_qad.formats.e2m1 import round_to_e2m1_
from megatron_qad.formats.format_registry import FORMATS, KV_CACHE_FORMATS
from megatron_qad.formats.input_scales import MIN_MARGIN, tie_margin
from megatron_qad.formats.nvfp4_format import NVFP4

MANTISSAS = 1 + torch.arange(128) / 128  # of all bfloat16 numbers
AMAXES = (MANTISSAS * 2.0**4).view(-1, 1)


def reciprocal(x: torch.Tensor, ulps: int) -> torch.Tensor:
    return ((1.0 / x).view(torch.int32) + ulps).view(torch.float32)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return round_to_e4m3_(x.clamp(min=E4M3_MIN))


def block_scales(scale: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the E4M3 scales of blocks with these amaxes under a global scale, by form."""
    sixth = torch.tensor(1 / 6)
    forms = {"division": max_scale(amax, scale), "two divisions": e4m3((amax / 6.0) / scale)}
    for ulps in (-1, 0, 1):
        g = reciprocal(scale, ulps)
        forms[f"reciprocal {ulps}"] = e4m3(g * (amax * sixth))
        forms[f"reciprocal {ulps}, sixth {ulps}"] = e4m3(g * (amax * reciprocal(torch.tensor(6.0), ulps)))
        forms[f"fused {ulps}"] = e4m3(amax * (g * sixth))
    return forms


def element_codes(scale: torch.Tensor, block_scale: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the E2M1 values of elements under a block scale and a global scale, by form."""
    forms = {"division": x / (block_scale * scale)}
    for ulps in (-1, 0, 1):
        g = reciprocal(scale, ulps)
        forms[f"reciprocals {ulps}"] = x * reciprocal(block_scale * reciprocal(g, ulps), ulps)
        forms[f"quotient {ulps}"] = x * (g / block_scale)
        forms[f"epilogue {ulps}"] = x * (g * reciprocal(block_scale, ulps))
    return {name: round_to_e2m1_(value.clone()) for name, value in forms.items()}


def num_differences(scale: torch.Tensor) -> tuple[int, int]:
    """Return how many block scales and elements depend on the form, over all forms.

    scale: float32 [n, 1]. Other binades of blocks and elements only repeat these, except that subnormal block scales
    are also tried.
    """
    amaxes = (2688 * scale * 2.0 ** torch.arange(-18.0, 0)).view(-1, 1)  # [n * 18, 1]
    amaxes = MANTISSAS * torch.exp2(amaxes.log2().floor())  # all bfloat16 numbers of 18 binades
    of_blocks = block_scales(scale.repeat_interleave(18, 0), amaxes)
    e4m3_mantissas = (1 + torch.arange(8) / 8).view(1, -1, 1)
    elements = torch.cat([MANTISSAS * 2.0**k for k in range(-3, 4)])  # quotients from 1/16 to 16
    x = elements.view(1, 1, -1) * torch.exp2(scale.log2().floor()).view(-1, 1, 1)
    of_elements = element_codes(scale.view(-1, 1, 1), e4m3_mantissas, x)
    return tuple(
        sum(int((values != forms["division"]).sum()) for values in forms.values()) for forms in (of_blocks, of_elements)
    )


def test_forms_of_kernels_agree_for_every_bfloat16_input_and_amax():
    scales = torch.stack([NVFP4.input_scale_from_amax(amax) for amax in AMAXES]).view(-1, 1)
    assert num_differences(scales) == (0, 0)
    assert min(num_differences(AMAXES / 2688)) > 1000  # the test would find the forms of amax / 2688


def test_input_scale_covers_the_amax_and_is_never_infinite():
    """Weights keep amax / 2688. The margin is small: it costs at most one part in 8,192 of the resolution."""
    for amax in (0.0, 1e-42, 0.3, 7.0, torch.finfo(torch.float32).max):
        amax = torch.tensor(amax)
        plain, scale = NVFP4.scale_from_amax(amax), NVFP4.input_scale_from_amax(amax)
        assert torch.equal(plain, nvfp4.global_scale_from_amax(amax)) and plain <= scale <= plain * 1.00013
        assert torch.isfinite(6.0 * (448.0 * scale))


def test_margin_of_every_bfloat16_amax():
    """amax / 2688 has ties for each of them; with the factor of ``tie_free`` the margin is above 2^-19."""
    scales = torch.stack([NVFP4.input_scale_from_amax(amax) for amax in AMAXES]).view(-1)
    assert tie_margin(AMAXES.view(-1) / 2688).max() < 2.0**-23
    assert tie_margin(scales).min() > 2.0**-19
    assert all(NVFP4.calibrated_amax(amax) is amax for amax in AMAXES)


def test_calibration_keeps_no_amax_whose_scale_has_ties():
    """Of random float32 amaxes, some have a bfloat16 input near a boundary; the kernels' forms differ for the worst."""
    amaxes = torch.rand(2000, generator=torch.Generator().manual_seed(1)) + 1
    kept = torch.stack([NVFP4.calibrated_amax(amax) for amax in amaxes])
    changed = kept != amaxes
    assert 10 < changed.sum() < 100  # 2 % expected
    assert torch.equal(kept[changed], kept[changed].bfloat16().float())
    assert (kept >= amaxes).all() and (kept <= amaxes * (1 + 2.0**-7)).all()
    before, after = (tie_margin(torch.stack([NVFP4.input_scale_from_amax(a) for a in of])) for of in (amaxes, kept))
    assert after.min() > MIN_MARGIN >= before.min()
    worst = NVFP4.input_scale_from_amax(amaxes[before.argmin()]).view(1, 1)
    assert sum(num_differences(worst)) > 0


@settings(max_examples=200, deadline=None)
@given(amax=st.floats(2.0**-100, 2.0**100, width=32))
def test_kv_scale_is_a_bfloat16_number_that_covers_the_amax(amax):
    """vLLM rounds the stored scale to the model's dtype; training uses the same number."""
    amax = torch.tensor(amax)
    kv = KV_CACHE_FORMATS["fp8"].number
    scale, exact = kv.input_scale_from_amax(amax), fp8.scale_from_amax(amax)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert exact <= scale < exact * (1 + 2**-7)
    below = (scale.view(torch.int32) - 0x10000).view(torch.float32)  # the next smaller bfloat16 number
    assert below < exact
    assert torch.equal(FORMATS["fp8"].input.input_scale_from_amax(amax), exact)  # linears keep float32 scales


def test_constant_amax_gives_scale_one():
    kv_format = KV_CACHE_FORMATS["fp8_cast"]
    assert kv_format.number.input_scale_from_amax(torch.tensor(kv_format.constant_amax)).item() == 1.0
