"""Quantized linears of transformers: the arithmetic of Megatron's jobs, one quantization per update, the gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F

from megatron_qad.engine.errors import QADError
from megatron_qad.formats import nvfp4, nvfp4_fixed
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.hf_training.linear_group import LinearGroup
from megatron_qad.hf_training.quantize_model import quantization_of, quantize_model
from megatron_qad.hf_training.quantized_linear import QuantizedLinear
from megatron_qad.quantization.scale_settings import ScaleSetting

NVFP4 = FORMATS["nvfp4"]


def make_group(setting: ScaleSetting, fmt=NVFP4, rows=(32, 16, 16), amax: float = 3.0) -> LinearGroup:
    """Return a group of linears with random weights, the largest of which is in the last one."""
    generator = torch.Generator().manual_seed(0)
    group = LinearGroup("decoder.layers.0.self_attention.linear_qkv.weight", fmt, setting)
    for num_rows in rows:
        linear = torch.nn.Linear(64, num_rows, bias=False)
        linear.weight.data.normal_(generator=generator)
        QuantizedLinear(linear, group)
    group.members[-1].weight.data[3, 5] = amax * 2
    group.freeze_scales()
    if group.input_format is not None:
        group.set_input_amax(torch.tensor(amax))
    return group


def fused_weight(group: LinearGroup) -> torch.Tensor:
    return torch.cat([linear.weight.detach() for linear in group.members])


def quantized(group: LinearGroup) -> torch.Tensor:
    return torch.cat([group.quantized_weight(linear, torch.float32) for linear in group.members])


@pytest.mark.parametrize("rule", ["max", "four_over_six", "mse", "mse_sweep"])
@pytest.mark.parametrize("update", ["every_step", "frozen"])
def test_weights_are_quantized_as_one_linear(rule, update):
    """q, k and v have one global scale, also after an update, when only frozen scales stay."""
    group = make_group(ScaleSetting(rule, update))
    frozen = group.setting.is_frozen
    first = fused_weight(group)
    scale = nvfp4.global_scale_from_amax(first.abs().amax(), rule=rule)
    blocks = nvfp4_fixed.block_scales(first, scale, rule=rule, amax=first.abs().amax())
    for change in (1.0, 1.5):
        for linear in group.members:
            linear.weight.data.mul_(change)
        group.weights_changed()
        whole = fused_weight(group)
        if frozen:
            expected = nvfp4_fixed.fake_quant_fixed(whole, scale, blocks)
        else:
            new_scale = nvfp4.global_scale_from_amax(whole.abs().amax(), rule=rule)
            expected = NVFP4.weight.rounded(whole, new_scale, name="w", rule=rule)
        assert torch.equal(quantized(group), expected), change


def test_the_input_is_quantized_with_tie_free_scales():
    group = make_group(ScaleSetting())
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    scale = NVFP4.input.input_scale_from_amax(torch.tensor(3.0))
    expected = F.linear(nvfp4.fake_quant(x, scale), group.quantized_weight(group.members[1], torch.float32))
    assert torch.equal(group.members[1](x), expected)


def test_gradients_are_straight_through_except_where_scales_saturate():
    group = make_group(ScaleSetting("max", "frozen"), FORMATS["nvfp4-w4a16"])
    linear = group.members[0]
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    linear.weight.data[2, :16] *= 4  # beyond what the frozen scale of its block holds
    saturated = group.saturated(linear)
    assert 0 < saturated[2, :16].sum() and not saturated[2, 16:].any()
    linear(x).sum().backward()
    expected = x.sum(0).expand_as(linear.weight).masked_fill(saturated, 0)
    torch.testing.assert_close(linear.weight.grad, expected)
    following = make_group(ScaleSetting("max"))
    assert following.saturated(following.members[0]) is None  # scales of every step follow the weights


@pytest.mark.parametrize("fused", [True, False])
def test_a_loop_of_ones_own_trains_on_current_weights(make_student, tokens, fused):
    """torch's fused optimizers do not increment versions; the weights are quantized again nevertheless."""
    model = make_student(scales="max")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    group = quantization_of(model).groups[0]
    for _ in range(3):
        model(tokens).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model(tokens)
    scale = nvfp4.global_scale_from_amax(fused_weight(group).abs().amax())
    assert torch.equal(quantized(group), NVFP4.weight.rounded(fused_weight(group), scale, name="w"))


def test_announced_updates_quantize_once(make_student, tokens):
    """Microbatches of one step, and forward passes that are recomputed, use the same quantized weights."""
    model = make_student()
    model.train().gradient_checkpointing_enable()
    groups = quantization_of(model).groups
    for group in groups:
        group.updates_are_announced = True
    made = []
    for _ in range(2):
        model(tokens).logits.mean().backward()
        made.append([group._weights[0].data_ptr() for group in groups])
    assert made[0] == made[1]
    first = groups[0].quantized_weight(groups[0].members[0], torch.float32)
    groups[0].members[0].weight.data.mul_(0.5)
    groups[0].weights_changed()
    assert not torch.equal(groups[0].quantized_weight(groups[0].members[0], torch.float32), first)


def test_loaded_weights_and_scales_are_used(make_student, tokens):
    student = make_student()
    expected, state = student(tokens).logits, copy.deepcopy(student.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.5)
        for name, buffer in student.named_buffers():
            if name.endswith("amax"):
                buffer.mul_(2)
    assert not torch.equal(student(tokens).logits, expected)
    student.load_state_dict(state)
    assert torch.equal(student(tokens).logits, expected)


def test_a_copy_has_scales_of_its_own(make_student, tokens):
    student = make_student()
    other, expected = copy.deepcopy(student), student(tokens).logits
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    assert not torch.equal(other(tokens).logits, expected)
    assert torch.equal(student(tokens).logits, expected)


def test_autocast_quantizes_16_bit_inputs_and_float32_masters():
    group = make_group(ScaleSetting("max"))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    weight = group.quantized_weight(group.members[0], torch.float32).bfloat16()
    scale = NVFP4.input.input_scale_from_amax(torch.tensor(3.0))
    with torch.autocast("cpu", torch.bfloat16):
        out = group.members[0](x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(nvfp4.fake_quant(x.bfloat16(), scale), weight))


def test_amaxes_stay_float32(make_student):
    state = make_student().to(torch.bfloat16).state_dict()
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in state.items()}
    assert kinds["input_amax"] == kinds["weight_amax"] == torch.float32
    assert kinds["weight_block_scales"] == torch.uint8 and kinds["weight"] == torch.bfloat16


def test_inputs_need_a_calibration(make_model, tokens):
    model = quantize_model(make_model())
    assert not quantization_of(model).is_calibrated
    with pytest.raises(QADError, match="linear_qkv: its input is quantized, but no calibration"):
        model(tokens)


def test_nan_in_a_weight_is_named(make_student, tokens):
    model = make_student()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(QADError, match="decoder.layers.3.mlp.linear_fc1.weight.*NaN"):
        model(tokens)
