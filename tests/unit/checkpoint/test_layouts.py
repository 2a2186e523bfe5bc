"""One linear on disk in each layout; configs equal to what modelopt writes and compressed-tensors parses."""

import dataclasses

import pytest
import torch

from megatron_qad.checkpoint.layouts import (
    HFTensor,
    exclusions,
    hf_quant_config,
    quantization_config,
    stored_tensors,
)
from megatron_qad.formats.nvfp4 import dequantize, fake_quant, global_scale_from_amax, tensor_amax
from megatron_qad.runtime.errors import QADError

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
    for part, scale in (("weight_global_scale", item.global_scale), ("input_global_scale", item.input_scale)):
        assert stored[f"{NAME}.{part}"].shape == (1,) and stored[f"{NAME}.{part}"][0] == 1 / scale


def test_plain_layout_and_plain_tensors_are_stored_as_they_are(item):
    assert torch.equal(stored_tensors(item, "bf16")[item.name], item.tensor)
    norm = HFTensor("model.norm.weight", torch.ones(32))
    for layout in ("bf16", "modelopt", "compressed-tensors"):
        stored = stored_tensors(norm, layout)
        assert list(stored) == [norm.name] and stored[norm.name].dtype == torch.float32


def test_a_plain_weight_is_rounded_only_when_asked(item):
    plain = dataclasses.replace(item, tensor=item.tensor + 0.01)
    plain = dataclasses.replace(plain, global_scale=global_scale_from_amax(tensor_amax(plain.tensor)))
    with pytest.raises(QADError, match=rf"{NAME}.weight: .* blocks"):
        stored_tensors(plain, "modelopt")
    assert len(stored_tensors(dataclasses.replace(plain, on_grid=False), "modelopt")) == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"global_scale": None}, "global_scale is nothing"),
        ({"input_scale": None}, "input_scale is nothing"),
        ({"input_scale": torch.tensor(0.0)}, "input_scale is 0.0"),
        ({"global_scale": torch.tensor(float("nan"))}, "global_scale is nan"),
        ({"global_scale": torch.ones((), dtype=torch.bfloat16)}, "bfloat16"),
        ({"module": None}, "named linear"),
        ({"tensor": torch.zeros(2, 2, 16)}, "2-D weight"),
        ({"fmt": "fp8"}, "'fp8' is unknown"),
    ],
)
def test_unusable_items_are_refused_by_name(item, change, text):
    with pytest.raises(QADError, match=text) as error:
        stored_tensors(dataclasses.replace(item, **change), "modelopt")
    assert str(error.value).startswith(item.name)


def test_exclusions_are_the_sorted_rest_and_strangers_are_refused():
    assert exclusions(["lm_head", "b", "a"], ["a"]) == ["b", "lm_head"]
    with pytest.raises(QADError, match="embed"):
        exclusions(["a"], ["a", "embed"])
    with pytest.raises(QADError, match="gguf"):
        quantization_config("gguf", [])


def test_modelopt_config_holds_all_that_modelopts_exporter_writes():
    convert = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    ours = quantization_config("modelopt", ["lm_head"])
    theirs = convert.convert_hf_quant_config_format(hf_quant_config(["lm_head"]))
    assert {key: ours[key] for key in theirs} == theirs
    assert set(ours) - set(theirs) == {"group_size", "kv_cache_quant_algo"}  # vLLM reads them here too


def test_compressed_tensors_config_parses_to_its_own_nvfp4_preset():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    parsed = quantization.QuantizationConfig.model_validate(quantization_config("compressed-tensors", ["lm_head"]))
    group = parsed.config_groups["group_0"]
    assert group.weights.model_dump() == scheme.NVFP4["weights"].model_dump()
    assert group.input_activations.model_dump() == scheme.NVFP4["input_activations"].model_dump()
    assert group.input_activations.scale_dtype == torch.float8_e4m3fn
    assert (parsed.ignore, parsed.quantization_status, group.targets) == (["lm_head"], "compressed", ["Linear"])
