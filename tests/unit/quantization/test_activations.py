"""Tests of input quantizers: max calibration, the quantized forward pass, and the straight-through gradient."""

import pytest
import torch

from megatron_qad.engine import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.formats.nvfp4_format import NVFP4
from megatron_qad.quantization.activations import ActivationQuantizers

FORMATS = {"decoder.layers.0.linear.weight": "nvfp4", "decoder.layers.1.linear.weight": "bf16"}
NAME = "decoder.layers.0.linear"


def inputs(seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def calibrate(chunk, linears, batches, formats=FORMATS) -> ActivationQuantizers:
    quantizers = ActivationQuantizers([chunk], formats)
    with quantizers.calibrating():
        for x in batches:
            for linear in linears(chunk):
                x = linear(x)
    return quantizers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calibration_records_the_maximum_without_quantizing(make_chunk, linears, dtype):
    chunk = make_chunk(dtype=dtype)
    batches = [inputs(seed, dtype) for seed in range(3)]
    first_output = linears(chunk)[0](batches[0])
    quantizers = ActivationQuantizers([chunk], FORMATS)
    assert list(quantizers.quantizers) == [NAME] and not quantizers.calibrated
    with quantizers.calibrating():
        for x in batches:
            out = linears(chunk)[0](x)
            assert torch.equal(out, first_output) == (x is batches[0])
    amax = quantizers.quantizers[NAME]._amax
    assert quantizers.calibrated and amax.dtype == torch.float32 and amax.shape == (1,)
    assert amax.item() == max(x.abs().max().item() for x in batches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_pass_fake_quantizes_the_input(make_chunk, linears, dtype):
    chunk = make_chunk(dtype=dtype)
    first, second = linears(chunk)
    calibrate(chunk, linears, [inputs(0, dtype)])
    x = inputs(1, dtype) * 3  # exceeds the calibrated maximum, so values saturate
    scale = NVFP4.input_scale_from_amax(inputs(0, dtype).abs().max())
    quantized = nvfp4.fake_quant(x, scale)
    assert not torch.equal(quantized, x)
    assert torch.equal(first(x), torch.nn.functional.linear(quantized, first.weight))
    hidden = torch.randn(3, 48, generator=torch.Generator().manual_seed(7)).to(dtype)
    assert torch.equal(second(hidden), torch.nn.functional.linear(hidden, second.weight))  # bf16 by policy


def test_gradient_is_straight_through(make_chunk, linears):
    chunk = make_chunk()
    first = linears(chunk)[0]
    calibrate(chunk, linears, [inputs(0)])
    x = (inputs(1) * 3).requires_grad_()
    out = first(x)
    out.backward(torch.ones_like(out))
    # The output gradient times the weight, including saturated inputs; tolerance for a float32 sum of 48 terms.
    torch.testing.assert_close(x.grad, first.weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


def test_weight_and_output_quantizers_are_disabled(make_chunk, linears):
    chunk = make_chunk()
    calibrate(chunk, linears, [inputs(0)])
    for linear in linears(chunk):
        assert not linear.weight_quantizer.is_enabled and not linear.output_quantizer.is_enabled


def test_quantizer_names_are_global(make_chunk):
    chunks = [make_chunk(first_layer=1), make_chunk(first_layer=3)]
    formats = dict.fromkeys((f"decoder.layers.{i}.linear.weight" for i in range(4)), "nvfp4")
    assert list(ActivationQuantizers(chunks, formats).quantizers) == [f"decoder.layers.{i}.linear" for i in range(4)]


def test_linear_without_calibration_input_is_an_error(make_chunk, linears):
    chunk = make_chunk()
    quantizers = ActivationQuantizers([chunk], dict.fromkeys(FORMATS, "nvfp4"))
    with (
        pytest.raises(QADError, match=r"decoder\.layers\.1\.linear has amax 0\.0.*'decoder\.layers\.1\.linear=bf16'"),
        quantizers.calibrating(),
    ):
        linears(chunk)[0](inputs(0))


@pytest.mark.parametrize("value, amax", [(float("nan"), "inf"), (float("inf"), "inf"), (0.0, "0.0")])
def test_invalid_amax_is_an_error(make_chunk, linears, value, amax):
    chunk = make_chunk()
    quantizers = ActivationQuantizers([chunk], FORMATS)
    x = torch.zeros(2, 32)
    x[1, 3] = value
    with pytest.raises(QADError, match=rf"the input of {NAME} has amax {amax}"), quantizers.calibrating():
        linears(chunk)[0](inputs(0) * 0)
        linears(chunk)[0](x)
        linears(chunk)[0](inputs(0) * 0)  # a later finite input does not hide the value


def test_second_calibration_replaces_the_first(make_chunk, linears):
    chunk = make_chunk()
    quantizers = calibrate(chunk, linears, [inputs(0) * 100])
    with quantizers.calibrating():
        linears(chunk)[0](inputs(1))
    assert quantizers.quantizers[NAME]._amax.item() == inputs(1).abs().max().item()


def test_checkpoint_loads_into_expected_amaxes(make_chunk, linears):
    saved = make_chunk()
    amax = calibrate(saved, linears, [inputs(0)]).quantizers[NAME]._amax.clone()
    state = {name: value for name, value in saved.state_dict().items() if name.endswith("_amax")}
    assert list(state) == [f"{NAME}.input_quantizer._amax"]

    chunk = make_chunk()
    quantizers = ActivationQuantizers([chunk], FORMATS)
    quantizers.expect_amax()
    assert not quantizers.calibrated
    chunk.to(torch.bfloat16)  # as Megatron's wrapper of 16-bit models does before a checkpoint is loaded
    chunk.load_state_dict(state, strict=False)
    assert quantizers.calibrated
    loaded = quantizers.quantizers[NAME]._amax
    assert loaded.dtype == torch.float32 and loaded.shape == (1,)
    assert loaded.item() == amax.bfloat16().item()


def test_no_quantizers_count_as_calibrated(make_chunk):
    quantizers = ActivationQuantizers([make_chunk()], {})
    assert quantizers.calibrated
