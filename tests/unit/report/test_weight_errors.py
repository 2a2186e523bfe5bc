"""Weight errors of an imported checkpoint, compared with Hugging Face's tensors and modelopt's NVFP4."""

import pytest
import torch
from modelopt.torch.quantization.qtensor import NVFP4QTensor

from megatron_qad.checkpoint.torch_dist import TorchDistReader
from megatron_qad.engine.errors import QADError
from megatron_qad.formats import nvfp4
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.quantization.scale_settings import ScaleSetting
from megatron_qad.report.weight_errors import linear_errors, relative_distance

# Far above the difference of two float64 sums of the same squares in another order.
SAME = {"rel": 1e-9}


def hf_parts(teacher):
    """Return the Hugging Face tensors of each Megatron weight; norms do not depend on the order of rows."""
    hf = torch.load(teacher.parent / "hf.pt")
    parts = {}
    for block in range(2):
        layer = f"model.layers.{block}"
        attention, mlp = f"decoder.layers.{2 * block}.self_attention", f"decoder.layers.{2 * block + 1}.mlp"
        parts[f"{attention}.linear_qkv.weight"] = [hf[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv"]
        parts[f"{attention}.linear_proj.weight"] = [hf[f"{layer}.self_attn.o_proj.weight"]]
        parts[f"{mlp}.linear_fc1.weight"] = [hf[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        parts[f"{mlp}.linear_fc2.weight"] = [hf[f"{layer}.mlp.down_proj.weight"]]
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def modelopt_round(weight):
    """Quantize and dequantize one weight with modelopt and its own global scale, in the weight's dtype."""
    packed, block_scale, global_scale = NVFP4QTensor.quantize(weight.float(), 16)
    return packed.dequantize(
        dtype=torch.float32, scale=block_scale, double_scale=global_scale, block_sizes={-1: 16}
    ).to(weight.dtype)


def norm_ratio(a, b):
    return ((a.double() - b.double()).square().sum().sqrt() / b.double().square().sum().sqrt()).item()


def run_tensors(teacher, noise, *, quantized):
    """Return the tensors of a trained run: the teacher's weights plus noise, and an input amax for each."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for i, (name, weight) in enumerate(hf_parts(teacher).items()):
        moved = (weight.float() + noise * torch.randn(weight.shape, generator=generator)).bfloat16()
        if quantized:
            moved = nvfp4.fake_quant(moved, nvfp4.global_scale_from_amax(nvfp4.tensor_amax(moved)))
        tensors[name] = moved
        module = name.removesuffix(".weight")
        tensors[f"{module}.input_quantizer._amax"] = torch.tensor([1.5 + i])
    return tensors


def as_saved(tensors):
    """Split gate and up, as Megatron saves them."""
    saved = {}
    for name, tensor in tensors.items():
        if name.endswith("linear_fc1.weight"):
            saved[f"{name}_w"], saved[f"{name}_v"] = (half.contiguous() for half in tensor.chunk(2))
        else:
            saved[name] = tensor
    return saved


def test_ptq_error_matches_modelopt(teacher, formats):
    errors = linear_errors(teacher, {"QAD": formats}, {})
    expected = hf_parts(teacher)
    assert [m.name for m in errors] == list(expected)  # model order, without the BF16 head
    for linear in errors:
        weight = expected[linear.name]
        assert linear.shape == tuple(weight.shape) and linear.runs == {}
        assert linear.ptq_error == pytest.approx(norm_ratio(modelopt_round(weight), weight), **SAME)
        assert 0.05 < linear.ptq_error < 0.15  # Gaussian weights in NVFP4 lose about 9.5 %


@pytest.mark.parametrize("quantized", [True, False], ids=["saved-quantized", "saved-before-quantization"])
def test_distance_and_amax_of_a_trained_run(teacher, formats, save_checkpoint, tmp_path, quantized):
    # For qkv both sides need Megatron's order of rows, so the run's weight starts from the imported tensor.
    tensors = run_tensors(teacher, 0.01, quantized=quantized)
    qkv = [name for name in tensors if name.endswith("linear_qkv.weight")]
    for name, weight in TorchDistReader(teacher).read(qkv).items():
        moved = (weight.float() * 1.25).bfloat16()
        tensors[name] = modelopt_round(moved) if quantized else moved
    save_checkpoint(tmp_path, 7, as_saved(tensors))

    teacher_weights = hf_parts(teacher) | TorchDistReader(teacher).read(qkv)
    errors = linear_errors(teacher, {"QAD": formats, "PTQ": formats}, {"QAD": tmp_path})
    for i, linear in enumerate(errors):
        weight = tensors[linear.name]
        expected = weight if quantized else modelopt_round(weight)
        measured = linear.runs["QAD"]
        assert measured.distance == pytest.approx(norm_ratio(expected, teacher_weights[linear.name]), **SAME)
        assert measured.distance > linear.ptq_error * 1.5  # a distance that ignores the run's weight would fail here
        assert measured.input_amax == 1.5 + i
        assert set(linear.runs) == {"QAD"}


def test_only_quantized_linears_of_a_run_are_measured(teacher, formats, save_checkpoint, tmp_path):
    tensors = run_tensors(teacher, 0.01, quantized=True)
    del tensors["decoder.layers.1.mlp.linear_fc1.input_quantizer._amax"]
    save_checkpoint(tmp_path, 1, as_saved(tensors))
    skipped = "decoder.layers.0.self_attention.linear_proj.weight"
    errors = linear_errors(
        teacher,
        {"all": formats | {"output_layer.weight": "nvfp4"}, "part": formats | {skipped: "bf16"}},
        {"part": tmp_path},
    )
    by_name = {linear.name: linear for linear in errors}
    assert list(by_name)[-1] == "output_layer.weight" and by_name["output_layer.weight"].layer is None
    assert by_name["output_layer.weight"].projection == "output_layer" and by_name["output_layer.weight"].runs == {}
    assert by_name[skipped].runs == {} and by_name[skipped].ptq_error > 0
    assert by_name["decoder.layers.1.mlp.linear_fc1.weight"].runs["part"].input_amax is None


def test_missing_tensor_is_an_error(teacher, formats, save_checkpoint, tmp_path):
    tensors = as_saved(run_tensors(teacher, 0.01, quantized=True))
    del tensors["decoder.layers.3.mlp.linear_fc2.weight"]
    save_checkpoint(tmp_path, 1, tensors)
    with pytest.raises(QADError, match="decoder.layers.3.mlp.linear_fc2.weight"):
        linear_errors(teacher, {"QAD": formats}, {"QAD": tmp_path})


def test_weight_with_nan_is_an_error(teacher, formats, save_checkpoint, tmp_path):
    tensors = as_saved(run_tensors(teacher, 0.01, quantized=True))
    tensors["decoder.layers.3.mlp.linear_fc2.weight"][3, 5] = float("nan")
    save_checkpoint(tmp_path, 1, tensors)
    with pytest.raises(QADError, match="decoder.layers.3.mlp.linear_fc2.weight"):
        linear_errors(teacher, {"QAD": formats}, {"QAD": tmp_path})


@pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
def test_export_does_not_change_a_quantized_float32_weight(fmt):
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    number_format = FORMATS[fmt].weight
    rounded = number_format.rounded(weight, number_format.scale_from_amax(weight.abs().max()), name="w")
    assert not torch.equal(rounded, weight)
    assert torch.equal(number_format.as_exported(rounded, name="w"), rounded)
    assert torch.equal(number_format.as_exported(weight, name="w"), rounded)


def test_each_run_uses_its_format_and_scale_rule(teacher, formats):
    def error(fmt, rule="max"):
        scales = {"run": dict.fromkeys(formats, ScaleSetting(rule))}
        return linear_errors(teacher, {"run": dict.fromkeys(formats, fmt)}, {}, scales)[0].ptq_error

    nvfp4_error = error("nvfp4")
    assert error("fp8") < nvfp4_error / 3  # E4M3 rounds by at most 2^-4 of a value, E2M1 by up to a third
    assert error("nvfp4", "mse") < error("nvfp4", "four_over_six") < nvfp4_error
    assert error("nvfp4-w4a16") == nvfp4_error


def test_relative_distance_of_zeros():
    zero, one = torch.zeros(4), torch.ones(4)
    assert relative_distance(zero, zero) == 0.0
    assert relative_distance(one, zero) == float("inf")
    assert relative_distance(zero, one) == 1.0
