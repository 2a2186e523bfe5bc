"""Tests of frozen and carried scales in one process. Parallelism, checkpoints, exports: tests/dist/test_frozen.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qad.engine import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.formats.nvfp4_fixed import saturation_limits
from megatron_qad.formats.nvfp4_format import NVFP4
from megatron_qad.models import weight_loading
from megatron_qad.quantization import carried_scales
from megatron_qad.quantization.in_place_weights import InPlaceWeights
from megatron_qad.quantization.scale_settings import ScaleSetting

NAME = "decoder.layers.0.linear.weight"
FORMATS = {NAME: "nvfp4", "decoder.layers.1.linear.weight": "nvfp4"}
RULES = ["max", "four_over_six", "mse", "mse_sweep"]


def frozen(chunk, rule: str = "max", update: str = "frozen") -> InPlaceWeights:
    weights = InPlaceWeights([chunk], FORMATS, scales={NAME: ScaleSetting(rule, update)})
    weights.initialize_scales()
    return weights


def amax_of(weight: torch.Tensor) -> torch.Tensor:
    return nvfp4.tensor_amax(weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_scales_are_those_of_the_initial_weight(make_chunk, linears, rule, dtype):
    chunk, other = make_chunk(dtype=dtype), make_chunk(dtype=dtype)
    weight, initial = linears(chunk)[0].weight, linears(chunk)[0].weight.detach().clone()
    weights = frozen(chunk, rule)
    assert list(weights.carried) == [NAME]
    weights.quantize_()
    InPlaceWeights([other], FORMATS, scales={NAME: ScaleSetting(rule)}).quantize_()
    assert torch.equal(weight, linears(other)[0].weight)  # the first step is the same as with every_step
    assert torch.equal(linears(chunk)[1].weight, linears(other)[1].weight)
    with torch.no_grad():
        weight.copy_(initial * 1.3)
    weights.quantize_()
    scale = NVFP4.scale_from_amax(amax_of(initial), rule=rule)
    blocks = NVFP4.block_scales(initial, scale, rule=rule, amax=amax_of(initial))
    assert torch.equal(weight, NVFP4.fake_quant_fixed((initial * 1.3).to(dtype), scale, blocks))
    assert amax_of(weight) <= 6 * 448 * scale  # values beyond it saturate


def test_quantized_weights_that_are_loaded_do_not_change(make_chunk, linears):
    chunk, loaded = make_chunk(dtype=torch.bfloat16), make_chunk(dtype=torch.bfloat16)
    weights = frozen(chunk, "mse_sweep")
    with torch.no_grad():
        linears(chunk)[0].weight.mul_(1.1)
    weights.quantize_()
    resumed = InPlaceWeights([loaded], FORMATS, scales={NAME: ScaleSetting("mse_sweep", "frozen")})
    loaded.load_state_dict(chunk.state_dict())
    resumed.quantize_()
    assert torch.equal(linears(loaded)[0].weight, linears(chunk)[0].weight)


def test_carried_amax_identifies_a_quantized_weight(make_chunk, linears):
    """The rule mse_sweep may clip the largest value, so that the amax of the quantized weight is another one."""
    chunk, loaded, without = (make_chunk(dtype=torch.bfloat16) for _ in range(3))
    linears(chunk)[0].weight.data[0, :16] = 9.3  # fits 6 * 416 in units of the global scale
    linears(chunk)[0].weight.data[0, 0] = 10
    weights = frozen(chunk, "mse_sweep", "every_step")
    weights.quantize_()
    saved = linears(chunk)[0].weight.detach().clone()
    assert weights.carried[NAME].amax != amax_of(saved), "the example does not show the problem"
    resumed = InPlaceWeights([loaded], FORMATS, scales={NAME: ScaleSetting("mse_sweep")})
    loaded.load_state_dict(chunk.state_dict())
    resumed.quantize_()
    assert torch.equal(linears(loaded)[0].weight, saved)
    linears(without)[0].weight.data.copy_(saved)
    frozen(without, "mse_sweep", "every_step").quantize_()
    assert not torch.equal(linears(without)[0].weight, saved)


def test_carried_amax_follows_the_weight(make_chunk, linears):
    chunk = make_chunk(dtype=torch.bfloat16)
    weights = frozen(chunk, "mse_sweep", "every_step")
    weights.quantize_()
    with torch.no_grad():
        linears(chunk)[0].weight.copy_(torch.linspace(-7, 7, 48 * 32).view(48, 32))
    weights.quantize_()
    assert weights.carried[NAME].amax == 7


class PlainQuantizer(torch.autograd.Function):
    """Straight-through rounding; the clamp before it has the gradient."""

    @staticmethod
    def forward(ctx, weight, scale, blocks):
        return NVFP4.fake_quant_fixed(weight, scale, blocks)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


@pytest.mark.parametrize("masters", ["float32 weight", "float32 copy", "shard"])
def test_gradient_is_that_of_a_clamp(make_chunk, linears, masters):
    """Compared with torch's autograd of ``quantize(clamp(weight, -limit, limit))`` in float32."""
    chunk = make_chunk(dtype=torch.float32 if masters == "float32 weight" else torch.bfloat16)
    weight = linears(chunk)[0].weight
    weights = frozen(chunk)
    carried = weights.carried[NAME]
    limits = carried.limits().repeat_interleave(16, -1)
    master = weight.detach().float() * 1.2
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    reference = master.to(weight.dtype).float().requires_grad_()
    quantized = PlainQuantizer.apply(reference.clamp(-limits, limits), carried.scale, carried.block_scales)
    (x @ quantized.T).square().sum().backward()
    assert 0.005 < (reference.grad == 0).float().mean() < 0.5

    weight.data.copy_(master)
    weights.quantize_()
    assert torch.equal(weight.float(), quantized.to(weight.dtype).float())
    weight.main_grad = 2 * (x @ quantized.detach().T).T @ x  # of the unclamped weight
    expected, optimizer = reference.grad, None
    if masters == "float32 weight":
        weight.data.copy_(master)
    elif masters == "float32 copy":
        weight.main_param = master
    else:  # of a distributed optimizer, from within one block to within another
        weight.main_param_sharded, weight.main_param = True, master.flatten()[103:901]
        expected = weight.main_grad.clone()
        expected.view(-1)[103:901] = reference.grad.flatten()[103:901]
        optimizer = Shard(weight, 103, 901)
    weights.mask_gradients_(optimizer)
    assert torch.equal(weight.main_grad == 0, expected == 0)
    # Both are sums of 5 float32 products, in another order.
    torch.testing.assert_close(weight.main_grad, expected, rtol=1e-5, atol=1e-4)


class Shard:
    """The part of Megatron's distributed optimizer that knows which elements it holds; tests/dist runs the whole."""

    def __init__(self, parameter, start: int, end: int):
        self.model_param_gbuf_map = {parameter: None}
        self._range = type("Range", (), {"start": start, "end": end, "size": end - start})

    def _get_model_param_range_map(self, parameter):
        return {"param": self._range}


@pytest.mark.parametrize("rule", ["max", "four_over_six"])
@given(seed=st.integers(0, 2**31), exponent=st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_no_element_is_saturated_at_the_start(rule, seed, exponent):
    """A block scale that is rounded down leaves the largest values above 6 times it. They must be trained, too."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 64, generator=generator) * torch.randn(8, 64, generator=generator).abs() ** exponent
    scale = NVFP4.scale_from_amax(amax_of(weight), rule=rule)
    blocks = NVFP4.block_scales(weight, scale, rule=rule, amax=amax_of(weight))
    limits = saturation_limits(scale, blocks).repeat_interleave(16, -1)
    # The midpoint of two E4M3 numbers is a tie; three float32 roundings separate the two sides.
    assert bool((weight.abs() <= limits * (1 + 3 * 2.0**-24)).all())


def test_limits_above_the_largest_value_of_a_block():
    scales = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    limits = saturation_limits(torch.tensor(1 / 6), scales) / scales.float()
    assert bool((limits[8:] <= 1 + 2.0**-4 + 1e-6).all()) and bool((limits > 1).all())  # half a step of 2^-3
    below = (saturation_limits(torch.tensor(1.0), scales) / 6 * (1 - 1e-6)).to(torch.float8_e4m3fn)
    assert torch.equal(below.view(torch.uint8), scales.view(torch.uint8))


def test_each_expert_has_its_scales(experts):
    chunk, linear, formats = experts()
    scales = {name: ScaleSetting("four_over_six", "frozen") for name in formats}
    weights = InPlaceWeights([chunk], formats, scales=scales)
    weights.initialize_scales()
    initial = linear.weight.detach().clone()
    names = [f"decoder.layers.0.mlp.experts.experts.{i}.linear_fc1.weight" for i in (3, 4, 5)]
    assert list(weights.carried) == names
    weights.quantize_()
    for i, name in enumerate(names):
        scale = NVFP4.scale_from_amax(amax_of(initial[i]), rule="four_over_six")
        blocks = NVFP4.block_scales(initial[i], scale, rule="four_over_six", amax=amax_of(initial[i]))
        assert torch.equal(linear.weight[i], NVFP4.fake_quant_fixed(initial[i], scale, blocks))
        assert torch.equal(weights.carried[name].block_scales.view(torch.uint8), blocks.view(torch.uint8))
    linear.weight.data.copy_(initial)
    linear.weight.data[1] *= 2  # the middle expert outgrows half of its values
    linear.weight.main_grad = torch.ones_like(linear.weight)
    weights.mask_gradients_(optimizer=None)
    masked = (linear.weight.main_grad == 0).float().mean((1, 2)).tolist()
    assert masked[0] == masked[2] == 0 < masked[1]


def test_amax_stays_in_float32_when_a_model_is_converted(make_chunk):
    chunk = make_chunk()
    chunk.decoder.layers[0].linear.weight.data[0, 0] = 1 + 2.0**-20 + 100
    weights = frozen(chunk)
    amax, blocks = weights.carried[NAME].amax.clone(), weights.carried[NAME].block_scales.view(torch.uint8).clone()
    chunk.bfloat16()
    assert chunk.decoder.layers[0].linear.weight.dtype == torch.bfloat16
    assert torch.equal(weights.carried[NAME].amax, amax) and amax.dtype == torch.float32
    assert torch.equal(weights.carried[NAME].block_scales.view(torch.uint8), blocks)


def test_scales_that_were_never_set_are_an_error(make_chunk):
    weights = InPlaceWeights([make_chunk()], FORMATS, scales={NAME: ScaleSetting("max", "frozen")})
    with pytest.raises(QADError, match=rf"{NAME}: global scale is nan"):
        weights.quantize_()


def test_nan_is_named_when_scales_are_computed(make_chunk, linears):
    chunk = make_chunk()
    linears(chunk)[0].weight.data[3, 4] = torch.nan
    with pytest.raises(QADError, match=rf"{NAME}: amax is nan"):
        frozen(chunk)


def test_weights_that_carry_nothing_leave_the_chunk_as_it_is(make_chunk):
    chunk = make_chunk()
    before = list(chunk.state_dict())
    weights = frozen(chunk, "four_over_six", "every_step")
    assert not weights.carried and list(chunk.state_dict()) == before


def test_name_of_the_module_is_known_to_the_loading_of_weights():
    assert weight_loading._CARRIED == f"{carried_scales.CHILD}."
