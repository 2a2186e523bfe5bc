"""Tests of in-place weight quantization in one process. Sharded: tests/dist/test_sharded.py; jobs: test_training.py."""

import pytest
import torch

from megatron_qad.engine import QADError
from megatron_qad.formats import fp8, int4, nvfp4, nvfp4_pack
from megatron_qad.quantization.in_place_weights import InPlaceWeights

FORMATS = {"decoder.layers.0.linear.weight": "nvfp4", "decoder.layers.1.linear.weight": "bf16"}


def is_quantized(weight: torch.Tensor, rule: str = "max") -> bool:
    return nvfp4_pack.is_representable(weight, nvfp4.global_scale_from_amax(nvfp4.tensor_amax(weight), rule=rule))


def fake_quantized(weight: torch.Tensor) -> torch.Tensor:
    return nvfp4.fake_quant(weight, nvfp4.global_scale_from_amax(nvfp4.tensor_amax(weight)))


def test_only_weights_with_a_quantized_format_change(make_chunk, linears):
    chunk = make_chunk()
    first, second = (linear.weight.detach().clone() for linear in linears(chunk))
    weights = InPlaceWeights([chunk], FORMATS)
    assert list(weights.weights) == ["decoder.layers.0.linear.weight"]
    weights.quantize_()
    assert torch.equal(linears(chunk)[0].weight, fake_quantized(first)) and not torch.equal(
        fake_quantized(first), first
    )
    assert torch.equal(linears(chunk)[1].weight, second)


def test_weight_names_are_global_over_chunks(make_chunk):
    chunks = [make_chunk(), make_chunk(first_layer=3)]
    weights = InPlaceWeights(chunks, FORMATS | {"decoder.layers.3.linear.weight": "nvfp4"})
    assert list(weights.weights) == ["decoder.layers.0.linear.weight", "decoder.layers.3.linear.weight"]
    assert weights.weights["decoder.layers.3.linear.weight"] is chunks[1].decoder.layers[1].linear.weight


def test_bfloat16_weights_stay_quantized_until_the_optimizer_step(make_chunk, linears):
    chunk = make_chunk(dtype=torch.bfloat16)
    weight = linears(chunk)[0].weight
    before, address = weight.detach().clone(), weight.data_ptr()
    assert not is_quantized(before)
    weights = InPlaceWeights([chunk], FORMATS)
    with weights.quantized_weights(then_updated=True):
        assert is_quantized(weight.detach()) and torch.equal(weight, fake_quantized(before))
    assert torch.equal(weight, fake_quantized(before))
    assert weight.data_ptr() == address and weight.requires_grad  # the parameter itself, not a copy
    assert weights.num_quantizations == 1


def test_evaluations_between_two_steps_quantize_once(make_chunk, linears):
    chunk = make_chunk(dtype=torch.bfloat16)
    weights = InPlaceWeights([chunk], FORMATS)
    for then_updated, num_quantizations in ((False, 1), (False, 1), (True, 1), (True, 2), (False, 3), (True, 3)):
        with weights.quantized_weights(then_updated=then_updated):
            assert weights.num_quantizations == num_quantizations
        if then_updated:
            linears(chunk)[0].weight.data.add_(0.1)


def test_quantized_checkpoint_weights_are_not_quantized_again(make_chunk, linears):
    """The test includes blocks that would change: block scales near 2^-9 are too coarse to be found again."""
    chunk = make_chunk(dtype=torch.bfloat16)
    weight = linears(chunk)[0].weight
    weight.data.mul_(torch.tensor([1e-6, 1.0], dtype=torch.bfloat16).repeat_interleave(24)[:, None])
    weight.data[:24] *= torch.rand(24, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    InPlaceWeights([chunk], FORMATS).quantize_()
    saved = weight.detach().clone()
    assert is_quantized(saved)
    InPlaceWeights([chunk], FORMATS).quantize_()
    assert torch.equal(weight, saved)


def test_quantizing_normal_weights_is_idempotent(make_chunk):
    weight = fake_quantized(torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).bfloat16())
    assert torch.equal(fake_quantized(weight), weight)


def test_float32_masters_are_restored_even_after_an_error(make_chunk, linears):
    chunk = make_chunk()
    weight = linears(chunk)[0].weight
    before = weight.detach().clone()
    weights = InPlaceWeights([chunk], FORMATS)
    for then_updated in (True, False, False):
        with weights.quantized_weights(then_updated=then_updated):
            assert torch.equal(weight, fake_quantized(before))
        assert torch.equal(weight, before)
    with pytest.raises(ZeroDivisionError), weights.quantized_weights(then_updated=True):
        _ = 1 / 0
    assert torch.equal(weight, before)


def test_gradient_is_that_of_the_quantized_weight(make_chunk, linears):
    """Straight-through estimator: dL/dW at the quantized weight, independent of the master."""
    chunk = make_chunk()
    linear = linears(chunk)[0]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    quantized = fake_quantized(linear.weight.detach()).requires_grad_()
    (x @ quantized.T).square().sum().backward()
    with InPlaceWeights([chunk], FORMATS).quantized_weights(then_updated=True):
        linear(x).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, quantized.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_errors_name_the_weight(make_chunk, linears, value):
    chunk = make_chunk(dtype=torch.bfloat16)
    linears(chunk)[0].weight.data[3, 4] = value
    with pytest.raises(QADError, match=r"decoder\.layers\.0\.linear\.weight: amax is (nan|inf)"):
        InPlaceWeights([chunk], FORMATS).quantize_()


def test_without_quantized_formats_nothing_runs(make_chunk):
    weights = InPlaceWeights([make_chunk()], {})
    with weights.quantized_weights(then_updated=True):
        pass
    assert weights.num_quantizations == 0


FP8 = {"decoder.layers.0.linear.weight": "nvfp4", "decoder.layers.1.linear.weight": "fp8"}


def test_each_weight_has_its_own_format(make_chunk, linears):
    chunk = make_chunk(dtype=torch.bfloat16)
    before = [linear.weight.detach().clone() for linear in linears(chunk)]
    weights = InPlaceWeights([chunk], FP8)
    assert list(weights.formats.values()) == ["nvfp4", "fp8"]
    weights.quantize_()
    first, second = (linear.weight for linear in linears(chunk))
    assert torch.equal(first, fake_quantized(before[0]))
    assert torch.equal(second, fp8.fake_quant(before[1], fp8.scale_from_amax(nvfp4.tensor_amax(before[1]))))
    assert not torch.equal(second, before[1])
    saved = second.detach().clone()
    InPlaceWeights([chunk], FP8).quantize_()  # as for a checkpoint of quantized weights
    assert torch.equal(second, saved)


def test_int4_weights_are_quantized_in_place(make_chunk, linears):
    chunk = make_chunk((256, 128, 16), dtype=torch.bfloat16)
    before = linears(chunk)[0].weight.detach().clone()
    InPlaceWeights([chunk], dict.fromkeys(FP8, "int4-w4a16")).quantize_()
    saved = linears(chunk)[0].weight.detach().clone()
    assert torch.equal(saved, int4.dequantize(*int4.quantize(before), torch.bfloat16))
    assert not torch.equal(saved, before)
    InPlaceWeights([chunk], dict.fromkeys(FP8, "int4-w4a16")).quantize_()  # as after loading a quantized checkpoint
    assert torch.equal(linears(chunk)[0].weight, saved)


def test_shard_with_incomplete_blocks_is_rejected(make_chunk):
    with pytest.raises(QADError, match=r"layers\.0\.linear\.weight: its shard .* 32 columns; int4 needs .* 128"):
        InPlaceWeights([make_chunk()], dict.fromkeys(FP8, "int4-w4a16"))


@pytest.mark.parametrize("rule", ["four_over_six", "mse"])
def test_scale_rules_reduce_the_error_and_stay_representable(make_chunk, linears, rule):
    errors = {}
    for name in ("max", rule):
        chunk = make_chunk((256, 64, 16), dtype=torch.bfloat16)
        weight = linears(chunk)[0].weight
        before = weight.detach().clone()
        in_place = InPlaceWeights([chunk], FORMATS, scale_rule=name)
        _, copy = next(in_place.quantized_copies())
        assert torch.equal(weight, before)
        in_place.quantize_()
        assert torch.equal(weight, copy)
        errors[name] = (weight.detach().float() - before.float()).square().sum().item()
        assert nvfp4.tensor_amax(weight.data) == nvfp4.tensor_amax(before)  # which gives the global scale in exports
        assert is_quantized(weight.detach(), name)
        saved = weight.detach().clone()
        InPlaceWeights([chunk], FORMATS, scale_rule=name).quantize_()
        assert torch.equal(weight, saved)
    assert errors[rule] < 0.95 * errors["max"]


def test_fp8_nan_error_names_the_weight(make_chunk, linears):
    chunk = make_chunk(dtype=torch.bfloat16)
    linears(chunk)[1].weight.data[3, 4] = float("nan")
    with pytest.raises(QADError, match=r"decoder\.layers\.1\.linear\.weight"):
        InPlaceWeights([chunk], FP8).quantize_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_expert_has_its_own_scale(experts, dtype):
    """All local experts are one parameter; each is quantized like a weight of its own, under its global index."""
    chunk, linear, formats = experts()
    linear.to(dtype)
    before = linear.weight.detach().clone()
    weights = InPlaceWeights([chunk], formats)
    names = [f"decoder.layers.0.mlp.experts.experts.{i}.linear_fc1.weight" for i in (3, 4, 5)]
    assert list(weights.weights) == names
    assert weights.amaxes().tolist() == [w.abs().max().item() for w in before]
    linear.weight.data = linear.weight.data.clone()  # Megatron moves parameters into its buffers
    with weights.quantized_weights(then_updated=True):
        assert torch.equal(linear.weight, torch.stack([fake_quantized(w) for w in before]))
        assert all(torch.equal(weights.weights[name], linear.weight[i]) for i, name in enumerate(names))
    assert torch.equal(linear.weight, before) == (dtype == torch.float32)  # float32 masters are restored


def test_part_of_an_expert_is_a_view(experts):
    chunk, linear, formats = experts()
    linear.weight.main_grad = torch.zeros(3, 16, 32)
    second = list(InPlaceWeights([chunk], formats).linears.values())[1]
    second.part_of(second.parameter.main_grad).add_(1)
    assert linear.weight.main_grad.sum((1, 2)).tolist() == [0, 16 * 32, 0]
