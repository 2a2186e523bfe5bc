"""Second moments of inputs and the scales of ``local_hessian``, in one process. Parallelism: tests/dist."""

import pytest
import torch

from megatron_qad.engine import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.formats.nvfp4_format import NVFP4
from megatron_qad.quantization.activations import ActivationQuantizers
from megatron_qad.quantization.in_place_weights import InPlaceWeights
from megatron_qad.quantization.input_moments import MIN_TOKENS, InputMoments, block_moments
from megatron_qad.quantization.scale_settings import ScaleSetting
from megatron_qad.quantization.smoothing import Groups

NAME = "decoder.layers.0.linear.weight"
RULE = "local_hessian"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(x: torch.Tensor) -> torch.Tensor:
    """Return the mean of x_j x_j^T by its definition, float64 [in/16, 16, 16]."""
    blocks = x.double().reshape(-1, x.shape[-1] // 16, 16)
    return torch.stack([torch.stack([torch.outer(b, b) for b in block]).mean(0) for block in blocks.unbind(1)])


def prepared(chunk, formats: dict[str, str], names) -> tuple[ActivationQuantizers, InPlaceWeights]:
    activations = ActivationQuantizers([chunk], formats)
    weights = InPlaceWeights([chunk], formats, scales=dict.fromkeys(names, ScaleSetting(RULE, "frozen")))
    weights.initialize_scales()
    assert weights.waiting == list(weights.carried) and weights.waiting
    return activations, weights


def expected_scales(weight: torch.Tensor, rule: str = RULE, hessian: torch.Tensor | None = None) -> torch.Tensor:
    amax = nvfp4.tensor_amax(weight.detach())
    scale = NVFP4.scale_from_amax(amax, rule=rule)
    return NVFP4.block_scales(weight.detach(), scale, rule=rule, amax=amax, hessian=hessian).view(torch.uint8)


@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4-w4a16"])
def test_moments_are_those_of_the_input_before_its_quantization(make_chunk, linears, fmt):
    """As in modelopt: earlier linears read quantized inputs, and no weight is quantized."""
    chunk = make_chunk()
    (first, second), batches = linears(chunk), [normal(2, 9, 32, seed=i) for i in range(3)]
    names = [NAME, "decoder.layers.1.linear.weight"]
    activations, weights = prepared(chunk, dict.fromkeys(names, fmt), names)
    with activations.calibrating():
        for x in batches:
            second(first(x))
    moments = InputMoments([chunk], weights.waiting, Groups())
    before = second(first(batches[0]))
    with moments.collecting():
        assert torch.equal(second(first(batches[0])), before)
        for x in batches[1:]:
            second(first(x))
    second(first(batches[0] * 1000))  # is not observed any more
    x = torch.cat(batches)
    read = nvfp4.fake_quant(x, NVFP4.input_scale_from_amax(x.abs().max())) if fmt == "nvfp4" else x
    for name, inputs in zip(names, (x, read @ first.weight.T), strict=True):
        expected, hessian = reference(inputs), moments.of(name)
        # Sums of 54 float32 products, whose roundings add up to 54 * 2^-24 of the largest sum. The inputs of the second
        # linear are sums of 32 products themselves.
        torch.testing.assert_close(hessian.double(), expected, rtol=0, atol=float(expected.max()) * 2 * 54 * 2.0**-24)
        assert hessian.dtype == torch.float32 and hessian.shape == (inputs.shape[-1] // 16, 16, 16)
    weights.initialize_from_inputs(moments)
    assert not weights.waiting
    for name, linear in zip(names, (first, second), strict=True):
        chosen = weights.carried[name].block_scales.view(torch.uint8)
        assert torch.equal(chosen, expected_scales(linear.weight, hessian=moments.of(name)))
        assert not torch.equal(chosen, expected_scales(linear.weight, "mse_sweep"))


def test_output_error_is_smaller_than_that_of_the_plain_sweep(make_chunk, linears):
    """On inputs whose columns differ and are correlated, which is what the rule is for."""
    chunk = make_chunk((64, 48))
    (linear,) = linears(chunk)
    x = normal(400, 64) @ normal(64, 64, seed=1) * torch.linspace(0.1, 3, 64)
    name = "decoder.layers.0.linear.weight"
    _, weights = prepared(chunk, {name: "nvfp4-w4a16"}, [name])
    moments = InputMoments([chunk], [name], Groups())
    with moments.collecting():
        expected = linear(x)
    weights.initialize_from_inputs(moments)
    amax = nvfp4.tensor_amax(linear.weight.detach())
    scale, blocks = NVFP4.scale_from_amax(amax), expected_scales(linear.weight, "mse_sweep").view(torch.float8_e4m3fn)
    plain = NVFP4.fake_quant_fixed(linear.weight.detach(), scale, blocks)
    chosen = weights.carried[name].fake_quant(linear.weight.detach())
    errors = [(x @ w.T - expected).square().mean() for w in (chosen, plain)]
    assert errors[0] < 0.95 * errors[1], errors  # measured: 0.926


def test_scales_equal_modelopt(make_chunk, linears):
    """H of one linear in one pass has modelopt's bits, so the scales that formats/test_modelopt_scales compares do."""
    from modelopt.torch.quantization.model_calib import _LocalHessianAccumulator

    chunk = make_chunk()
    (linear, _), x = linears(chunk), normal(3, 21, 32).bfloat16().float()
    _, weights = prepared(chunk, {NAME: "nvfp4-w4a16"}, [NAME])
    moments, theirs = InputMoments([chunk], [NAME], Groups()), _LocalHessianAccumulator(48, 32, 16)
    with moments.collecting():
        for batch in x:
            linear(batch)
            theirs.accumulate(batch)
    assert torch.equal(moments.of(NAME), theirs.normalized_hessian())


def test_each_expert_has_its_moments(experts):
    """Experts are observed by their own tokens; one with too few is searched with the plain squared error."""
    chunk, linear, formats = experts()
    activations, weights = prepared(chunk, formats, formats)
    names, x = list(weights.carried), normal(60, 32)
    counts = ([20, 0, 10], [20, 0, 10])
    moments = InputMoments([chunk], weights.waiting, Groups())
    with activations.calibrating():
        linear(x[:30], counts[0])
    with moments.collecting():
        for i, count in enumerate(counts):
            linear(x[30 * i : 30 * (i + 1)], count)
    parts = [torch.cat([x[:20], x[30:50]]), None, torch.cat([x[20:30], x[50:]])]
    weights.initialize_from_inputs(moments)
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        chosen = weights.carried[name].block_scales.view(torch.uint8)
        if part is None:
            assert moments.of(name) is None
            assert torch.equal(chosen, expected_scales(linear.weight[i], "mse_sweep"))
        else:
            torch.testing.assert_close(moments.of(name).double(), reference(part), rtol=0, atol=1e-5)
            assert torch.equal(chosen, expected_scales(linear.weight[i], hessian=moments.of(name)))


def test_few_tokens_and_dead_inputs_free_no_error(make_chunk, linears):
    """Without the two rules, the search would take the smallest scale, under which all weights saturate near zero."""
    chunk = make_chunk()
    linear = linears(chunk)[0]
    prepared(chunk, {NAME: "nvfp4-w4a16"}, [NAME])
    few = InputMoments([chunk], [NAME], Groups())
    with few.collecting():
        linear(normal(MIN_TOKENS - 1, 32))
    assert few.of(NAME) is None
    dead = InputMoments([chunk], [NAME], Groups())
    x = normal(50, 32)
    x[:, 16:] = 0
    with dead.collecting():
        linear(x)
    hessian = dead.of(NAME)
    assert torch.equal(hessian[1], torch.eye(16)) and torch.equal(hessian[0], block_moments(x)[0] / 50)
    scales = expected_scales(linear.weight, hessian=hessian)
    assert torch.equal(scales[:, 1], expected_scales(linear.weight, "mse_sweep")[:, 1])
    zero = torch.stack([hessian[0], torch.zeros(16, 16)])
    assert bool((expected_scales(linear.weight, hessian=zero)[:, 1] == 1).all()), (
        "the example does not show the problem"
    )


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_inputs_that_are_not_finite_stop_the_job(make_chunk, linears, value):
    chunk = make_chunk()
    prepared(chunk, {NAME: "nvfp4-w4a16"}, [NAME])
    moments, x = InputMoments([chunk], [NAME], Groups()), normal(20, 32)
    x[3, 4] = value
    with pytest.raises(QADError, match=r"^calibration: the input of decoder\.layers\.0\.linear contains NaN or Inf"):
        with moments.collecting():
            linears(chunk)[0](x)


def test_loaded_scales_do_not_wait(make_chunk, linears):
    chunk, loaded = make_chunk(), make_chunk()
    _, weights = prepared(chunk, {NAME: "nvfp4-w4a16"}, [NAME])
    moments = InputMoments([chunk], [NAME], Groups())
    with moments.collecting():
        linears(chunk)[0](normal(20, 32))
    weights.initialize_from_inputs(moments)
    _, resumed = prepared(loaded, {NAME: "nvfp4-w4a16"}, [NAME])
    loaded.load_state_dict(chunk.state_dict())
    assert resumed.waiting == []
    resumed.initialize_from_inputs(InputMoments([loaded], [], Groups()))  # changes nothing
    pairs = [w.carried[NAME].block_scales.view(torch.uint8) for w in (weights, resumed)]
    assert torch.equal(*pairs)
