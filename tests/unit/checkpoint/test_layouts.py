"""Stored tensors of a linear in each layout, and configurations compared with modelopt and compressed-tensors."""

import dataclasses

import pytest
import torch

from megatron_qad.checkpoint.layout_configs import hf_quant_config, quantization_config
from megatron_qad.checkpoint.layouts import HFTensor, exclusions, kv_scales, stored_tensors
from megatron_qad.engine.errors import QADError
from megatron_qad.formats import fp8
from megatron_qad.formats.fp8_format import FP8_KV_CACHE
from megatron_qad.formats.nvfp4 import dequantize, fake_quant, global_scale_from_amax, tensor_amax

NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture
def item():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = global_scale_from_amax(tensor_amax(weight))
    return HFTensor(f"{NAME}.weight", fake_quant(weight, scale), NAME, "nvfp4", scale, torch.tensor(0.003))


def test_modelopt_names_dtypes_shapes_and_values(item):
    stored = stored_tensors(item, "modelopt")
    assert {name.removeprefix(NAME): (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        ".weight": (torch.uint8, (8, 16)),
        ".weight_scale": (torch.float8_e4m3fn, (8, 2)),
        ".weight_scale_2": (torch.float32, ()),
        ".input_scale": (torch.float32, ()),
    }
    decoded = dequantize(*list(stored.values())[:3], torch.bfloat16)
    assert torch.equal(decoded, item.tensor)
    assert stored[f"{NAME}.input_scale"] == item.input_scale


def test_compressed_tensors_has_the_same_bytes_and_reciprocal_scales(item):
    modelopt = list(stored_tensors(item, "modelopt").values())
    stored = stored_tensors(item, "compressed-tensors")
    packed, block_scale = stored[f"{NAME}.weight_packed"], stored[f"{NAME}.weight_scale"]
    assert torch.equal(packed, modelopt[0]) and torch.equal(
        block_scale.view(torch.uint8), modelopt[1].view(torch.uint8)
    )
    for part, scale in (("weight_global_scale", item.weight_scale), ("input_global_scale", item.input_scale)):
        assert stored[f"{NAME}.{part}"].shape == (1,) and stored[f"{NAME}.{part}"][0] == 1 / scale


def test_bf16_layout_and_unquantized_tensors_are_stored_unchanged(item):
    assert torch.equal(stored_tensors(item, "bf16")[item.name], item.tensor)
    norm = HFTensor("model.norm.weight", torch.ones(32))
    for layout in ("bf16", "modelopt", "compressed-tensors"):
        stored = stored_tensors(norm, layout)
        assert list(stored) == [norm.name] and stored[norm.name].dtype == torch.float32


def test_unquantized_weight_is_quantized_only_on_request(item):
    plain = dataclasses.replace(item, tensor=item.tensor + 0.01)
    plain = dataclasses.replace(plain, weight_scale=global_scale_from_amax(tensor_amax(plain.tensor)))
    with pytest.raises(QADError, match=rf"{NAME}.weight: .* blocks"):
        stored_tensors(plain, "modelopt")
    assert len(stored_tensors(dataclasses.replace(plain, is_fake_quantized=False), "modelopt")) == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight_scale": None}, "weight_scale is missing"),
        ({"input_scale": None}, "input_scale is missing"),
        ({"input_scale": torch.tensor(0.0)}, "input_scale is 0.0"),
        ({"weight_scale": torch.tensor(float("nan"))}, "weight_scale is nan"),
        ({"weight_scale": torch.ones((), dtype=torch.bfloat16)}, "bfloat16"),
        ({"module": None}, "named linear"),
        ({"tensor": torch.zeros(2, 2, 16)}, "2-D weight"),
        ({"fmt": "int4-w4a16"}, "int4-w4a16 is exported by --layout compressed-tensors only, found --layout modelopt"),
        ({"fmt": "int2"}, "'int2' cannot be exported"),
    ],
)
def test_invalid_items_are_errors(item, change, text):
    with pytest.raises(QADError, match=text) as error:
        stored_tensors(dataclasses.replace(item, **change), "modelopt")
    assert str(error.value).startswith(item.name)


def test_exclusions_are_sorted_and_unknown_modules_are_errors():
    assert exclusions(["lm_head", "b", "a"], ["a"]) == ["b", "lm_head"]
    with pytest.raises(QADError, match="embed"):
        exclusions(["a"], ["a", "embed"])
    with pytest.raises(QADError, match="gguf"):
        quantization_config("gguf", [], {})


@pytest.mark.parametrize("kv_cache", ["bf16", "fp8"])
@pytest.mark.parametrize(
    "formats",
    [
        {"a": "nvfp4", "b": "nvfp4"},
        {"a": "nvfp4-w4a16"},
        {"a": "fp8"},
        {"a": "nvfp4", "c": "fp8", "b": "nvfp4"},
        {"a": "fp8", "b": "nvfp4-w4a16", "c": "nvfp4"},
    ],
    ids=lambda formats: "+".join(formats.values()),
)
def test_modelopt_config_matches_modelopts_exporter(formats, kv_cache):
    convert = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    ours = quantization_config("modelopt", ["lm_head"], formats, kv_cache)
    expected = convert.convert_hf_quant_config_format(hf_quant_config(["lm_head"], formats, kv_cache))
    # Compared without order: modelopt numbers the groups in the order of its layers.
    groups, expected_groups = ours.pop("config_groups"), expected.pop("config_groups")
    assert sorted(map(str, map(_sorted, groups.values()))) == sorted(map(str, map(_sorted, expected_groups.values())))
    assert {key: ours[key] for key in expected} == expected
    assert set(ours) - set(expected) == {"group_size", "kv_cache_quant_algo"}  # also read by vLLM


def _sorted(group: dict) -> list:
    return sorted((key, sorted(v.items()) if isinstance(v, dict) else v) for key, v in group.items())


def test_compressed_tensors_config_matches_its_nvfp4_preset():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    config = quantization_config("compressed-tensors", ["lm_head"], {"a": "nvfp4"})
    parsed = quantization.QuantizationConfig.model_validate(config)
    group = parsed.config_groups["group_0"]
    assert group.weights.model_dump() == scheme.NVFP4["weights"].model_dump()
    assert group.input_activations.model_dump() == scheme.NVFP4["input_activations"].model_dump()
    assert group.input_activations.scale_dtype == torch.float8_e4m3fn
    assert (parsed.ignore, parsed.quantization_status, group.targets) == (["lm_head"], "compressed", ["Linear"])


def test_compressed_tensors_config_has_one_group_per_format():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    formats = {"b": "nvfp4", "a": "nvfp4", "c": "fp8", "d": "nvfp4-w4a16"}
    config = quantization_config("compressed-tensors", ["lm_head"], formats, "fp8")
    parsed = quantization.QuantizationConfig.model_validate(config)
    fp8_group, nvfp4_group, w4a16_group = parsed.config_groups.values()
    assert fp8_group.weights.model_dump() == scheme.FP8["weights"].model_dump()
    assert (fp8_group.weights.num_bits, fp8_group.input_activations.num_bits) == (8, 8)
    assert nvfp4_group.weights.model_dump() == scheme.NVFP4["weights"].model_dump()
    assert w4a16_group.weights.model_dump() == scheme.NVFP4A16["weights"].model_dump()
    assert w4a16_group.input_activations is None
    assert [group.targets for group in (fp8_group, nvfp4_group, w4a16_group)] == [["c"], ["a", "b"], ["d"]]
    assert parsed.format == "mixed-precision" and parsed.kv_cache_scheme.num_bits == 8


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_w4a16_has_no_input_scale(item, layout):
    w4a4 = stored_tensors(item, layout)
    stored = stored_tensors(dataclasses.replace(item, fmt="nvfp4-w4a16", input_scale=None), layout)
    assert stored.keys() < w4a4.keys() and [name for name in w4a4 if name not in stored][0].endswith(
        {"modelopt": "input_scale", "compressed-tensors": "input_global_scale"}[layout]
    )
    for name, value in stored.items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), w4a4[name].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("layout, shape", [("modelopt", ()), ("compressed-tensors", (1,))])
def test_fp8_names_dtypes_shapes_and_values(layout, shape):
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    scale = fp8.scale_from_amax(tensor_amax(weight))
    quantized = fp8.fake_quant(weight, scale)
    item = HFTensor(f"{NAME}.weight", quantized, NAME, "fp8", scale, torch.tensor(0.25))
    stored = {name.removeprefix(NAME): t for name, t in stored_tensors(item, layout).items()}
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        ".weight": (torch.float8_e4m3fn, (8, 32)),
        ".weight_scale": (torch.float32, shape),
        ".input_scale": (torch.float32, shape),
    }
    assert torch.equal(fp8.dequantize(stored[".weight"], stored[".weight_scale"], torch.bfloat16), quantized)
    assert stored[".input_scale"].item() == 0.25  # not inverted in either layout


@pytest.mark.parametrize(
    "layout, names",
    [("modelopt", ["x.k_proj.k_scale", "x.v_proj.v_scale"]), ("compressed-tensors", ["x.k_scale", "x.v_scale"])],
)
def test_kv_scales_are_amax_over_448_without_a_clamp(layout, names):
    items = kv_scales("x.k_proj", "x.v_proj", torch.tensor([44.8]), torch.tensor([8960.0]), layout, FP8_KV_CACHE)
    assert [item.name for item in items] == names
    assert [item.tensor.item() for item in items] == [0.10009765625, 20.0]  # 0.1, rounded up to bfloat16
    assert kv_scales("x.k_proj", "x.v_proj", torch.tensor([1.0]), torch.tensor([1.0]), "bf16", FP8_KV_CACHE) == []
