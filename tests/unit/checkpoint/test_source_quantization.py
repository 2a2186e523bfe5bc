"""Quantized source models: recognized by name, or dequantized if they are FP8 with ``weight_scale_inv``."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_qad.checkpoint import source_names
from megatron_qad.checkpoint.hf_reader import HFReader, declared_dtype
from megatron_qad.checkpoint.source_quantization import FP8Source, without_quantization
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import family_of

sys.path.append(str(Path(__file__).parents[2] / "dist"))  # tiny_hybrids, tiny_job

import tiny_hybrids  # noqa: E402
import tiny_job  # noqa: E402

FP8 = torch.float8_e4m3fn
CONFIG = tiny_job.LLAMA | {"torch_dtype": "bfloat16"}
LINEAR = "model.layers.0.self_attn.q_proj"
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def write(directory: Path, quantization: dict | None, change, config: dict = CONFIG) -> Path:
    """Write a model; ``change`` (name, tensor) returns the stored tensors of each linear by name."""
    tiny_job.write_hf(directory, config, dtype=torch.bfloat16)
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if is_linear(name)]:
        weights |= change(name, weights.pop(name))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    if quantization is not None:
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return directory


def fp8(rows: int, columns: int, dtype: torch.dtype = torch.float32):
    """Return a change that stores FP8 weights with random scales for blocks of this size."""
    generator = torch.Generator().manual_seed(1)

    def change(name, tensor):
        shape = [-(-size // block) for size, block in zip(tensor.shape, (rows, columns), strict=True)]
        scale = torch.rand(shape, generator=generator) * 0.01 + 0.001
        return {name: (tensor.float() * 300).to(FP8), f"{name}_scale_inv": scale.to(dtype)}

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIG, tiny_hybrids.QWEN3_MOE | {"torch_dtype": "bfloat16"}], ids=["llama", "moe"])
def test_fp8_is_dequantized_as_transformers_does(tmp_path, dtype, config):
    """On a CPU transformers dequantizes to bfloat16 by itself. Here all sizes are multiples of the blocks."""
    directory = write(tmp_path / "hf", BLOCKS, fp8(16, 32, dtype), config)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    expected = {}
    for name, tensor in model.state_dict().items():
        expected |= tiny_hybrids.hub_names(config["model_type"], name, tensor)
    reader = HFReader(directory)
    assert reader.names == set(expected) and sum(map(is_linear, expected)) >= 14
    for name in reader.names:
        assert reader.read(name).dtype == torch.bfloat16 and torch.equal(reader.read(name), expected[name]), name


@pytest.mark.parametrize(("shape", "block"), [((5, 7), (2, 3)), ((200, 130), (128, 128)), ((3, 300), (128, 128))])
def test_partial_blocks_are_dequantized_by_the_formula(shape, block):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 50).to(FP8)
    scale = torch.rand([-(-n // size) for n, size in zip(shape, block, strict=True)], generator=generator)
    actual = FP8Source(block, frozenset(), frozenset()).dequantize(weight, scale, "w")
    expected = torch.empty(shape, dtype=torch.bfloat16)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected[i, j] = weight[i, j].float() * scale[i // block[0], j // block[1]]
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu])
def test_dtypes_of_scales(dtype):
    """Powers of two, which float8_e8m0fnu can store."""
    weight, scale = torch.tensor([[3.0, -448.0]]).to(FP8), torch.tensor([[0.25, 4.0]]).to(dtype)
    actual = FP8Source((1, 1), frozenset(), frozenset()).dequantize(weight, scale, "w")
    assert torch.equal(actual, torch.tensor([[0.75, -1792.0]]).bfloat16())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_weight_and_input_scales(tmp_path, shape):
    """Ministral 3 stores scalars, and scales of the inputs next to them."""

    def change(name, tensor):
        scales = {
            f"{name}_scale_inv": torch.full(shape, 0.37),
            name.replace("weight", "activation_scale"): torch.ones(()),
        }
        return {name: tensor.to(FP8)} | scales

    quantization = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    reader = HFReader(write(tmp_path / "hf", quantization, change))
    stored = load_file(tmp_path / "hf" / "model.safetensors")[f"{LINEAR}.weight"]
    assert torch.equal(reader.read(f"{LINEAR}.weight"), (stored.float() * torch.tensor(0.37)).bfloat16())
    assert not any("scale" in name for name in reader.names)


def test_fp8_base_model_is_renamed_with_its_scales(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    whole = HFReader(write(tmp_path / "whole", BLOCKS, fp8(16, 32), config))
    directory = write(tmp_path / "base", BLOCKS, fp8(16, 32), config)
    weights = load_file(directory / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in weights.items()}, directory / "model.safetensors")
    base = HFReader(directory)
    source_names.resolve(base, family_of(config).tensors(config))
    assert base.names == whole.names and all(torch.equal(base.read(n), whole.read(n)) for n in whole.names)


def only(*parts: str, dtype=torch.float32, weight=None):
    """Return a change that adds tensors with these last names, and stores the weight in another dtype."""

    def change(name, tensor):
        module = name.removesuffix(".weight")
        stored = {} if weight is None else {name: tensor.to(weight)}
        return stored | {f"{module}.{part}": torch.ones(1).to(dtype) for part in parts}

    return change


CASES = [
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, only("weight_scale", "weight_scale_2"),
     "is quantized .modelopt, NVFP4, groups of 16., for example .*weight_scale_2"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, only("weight_packed", "weight_shape"),
     "is quantized .compressed-tensors, pack-quantized., for example .*weight_packed"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized"}, only("weight_scale", weight=FP8),
     "is quantized .compressed-tensors, float-quantized., for example .*weight_scale"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, only("qweight", "qzeros", "scales", "g_idx"),
     "is quantized .gptq, 4 bits, groups of 128., for example .*qweight"),
    ({"quant_method": "awq", "bits": 4, "group_size": 64}, only("qweight", "qzeros", "scales"),
     "is quantized .awq, 4 bits, groups of 64."),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, only("weight.absmax", weight=torch.uint8),
     "is quantized .bitsandbytes, 4 bits., for example .*absmax"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, only("SCB", weight=torch.int8),
     "is quantized .bitsandbytes, 8 bits., for example .*SCB"),
    ({"quant_method": "mxfp4"}, only("gate_up_proj_blocks", "gate_up_proj_scales", dtype=torch.uint8),
     "is quantized .mxfp4., for example .*gate_up_proj_blocks"),
    ({"quant_method": "fbgemm_fp8"}, fp8(16, 32), "is quantized .fbgemm_fp8., for example .*F8_E4M3"),
    (None, only("weight_scale_2", "weight_scale"), "is quantized .modelopt NVFP4., for example .*weight_scale_2"),
    (BLOCKS, lambda name, tensor: fp8(16, 32)(name, tensor) | only("k_scale")(name, tensor),
     "is quantized .fp8, blocks of 16x32., for example .*k_scale .F32.. Give"),
    (None, only("weight_packed"), "is quantized .compressed-tensors., for example .*weight_packed"),
    (None, only("weight.quant_state.bitsandbytes__nf4"), "is quantized .bitsandbytes."),
    (None, only("k_scale", weight=torch.bfloat16), "is quantized .an FP8 KV cache., for example .*k_scale"),
    (None, only(weight=FP8), "is quantized .F8_E4M3., for example .*weight .F8_E4M3.. Give the BF16 model"),
    (None, only(weight=torch.float8_e5m2), "is quantized .F8_E5M2., for example .*weight .F8_E5M2."),
    (BLOCKS, only(weight=torch.bfloat16), "quantization_config of config.json declares quantized weights .fp8, blocks "
     "of 16x32., but the tensors are not quantized. Remove quantization_config"),
]  # fmt: skip


@pytest.mark.parametrize(("quantization", "change", "message"), CASES)
def test_other_quantized_models_are_refused_by_name(tmp_path, quantization, change, message):
    directory = write(tmp_path / "hf", quantization, change)
    with pytest.raises(QADError, match=message):
        HFReader(directory)


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}},
            "modelopt, FP8, KV",
        ),
        (
            "hf_quant_config.json",
            {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}},
            "modelopt, KV cache",
        ),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, "4 bits, groups of 128"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128}, "4 bits, groups of 128"),
    ],
)
def test_other_files_that_declare_a_quantization(tmp_path, file, content, what):
    directory = write(tmp_path / "hf", None, only("weight_scale", weight=torch.bfloat16))
    (directory / file).write_text(json.dumps(content))
    with pytest.raises(QADError, match=rf"is quantized \({what}"):
        HFReader(directory)


def test_declarations_in_inner_and_old_keys_are_found(tmp_path):
    directory = write(tmp_path / "hf", None, only(weight=torch.bfloat16))
    for key, config in (
        ("compression_config", {"compression_config": {"format": "dense"}}),
        ("llm_config.quantization_config", {"llm_config": {"quantization_config": BLOCKS}}),
    ):
        (directory / "config.json").write_text(json.dumps(CONFIG | config))
        with pytest.raises(QADError, match=f"{key} of config.json declares quantized weights"):
            HFReader(directory)
        assert without_quantization(CONFIG | config | {"quantization_config": BLOCKS}) == CONFIG | (
            {"llm_config": {}} if "llm_config" in config else {}
        )
    harmless = {"quantization_config": None, "compression_config": {}}
    (directory / "config.json").write_text(json.dumps(CONFIG | harmless))
    (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null}}')
    assert HFReader(directory).fp8 is None


def edited(**changes):
    """Return a change: FP8 in blocks, with some tensors of LINEAR replaced or removed (None)."""
    original = fp8(16, 32)

    def change(name, tensor):
        stored = original(name, tensor)
        if name == f"{LINEAR}.weight":
            stored |= {f"{LINEAR}.{part}": value for part, value in changes.items()}
        return {name: value for name, value in stored.items() if value is not None}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited(weight_scale_inv=None), rf"example {LINEAR}.weight .F8_E4M3, without {LINEAR}.weight_scale_inv."),
        (edited(weight=torch.ones(64, 64).bfloat16()), f"{LINEAR}.weight is BF16, but has a scale"),
        (edited(weight=None), f"{LINEAR}.weight is missing, but has a scale"),
        (edited(weight=torch.ones(64, 64).to(torch.float8_e5m2)), f"{LINEAR}.weight is F8_E5M2, but has a scale"),
        (
            edited(weight_scale_inv=torch.ones(4, 3)),
            r"weight_scale_inv: has shape \[4, 3\], expected \[4, 2\] for .*16x32",
        ),
        (edited(weight_scale_inv=torch.ones(2, 4)), r"weight_scale_inv: has shape \[2, 4\], expected \[4, 2\]"),
        (
            edited(weight_scale_inv=torch.ones(4, 2).int()),
            r"with a .*weight_scale_inv of int32 \[4, 2\]. Expected float8",
        ),
        (edited(weight=torch.ones(2, 32, 64).to(FP8)), r"is float8_e4m3fn \[2, 32, 64\] with .* two dimensions"),
    ],
)
def test_damaged_fp8_models_are_errors(tmp_path, change, message):
    directory = write(tmp_path / "hf", BLOCKS, change)
    with pytest.raises(QADError, match=message):
        HFReader(directory).read(f"{LINEAR}.weight")


@pytest.mark.parametrize("size", [[128], [0, 128], "128", [True, 1], [128.0, 128]])
def test_invalid_block_sizes_are_errors(tmp_path, size):
    directory = write(tmp_path / "hf", BLOCKS | {"weight_block_size": size}, fp8(16, 32))
    with pytest.raises(QADError, match="weight_block_size is .*, expected two positive integers"):
        HFReader(directory)


def test_missing_block_size_is_an_error(tmp_path):
    directory = write(tmp_path / "hf", {"quant_method": "fp8"}, fp8(16, 32))
    with pytest.raises(
        QADError, match=r"has shape \[4, 2\], but config.json has no quantization_config.weight_block_size"
    ):
        HFReader(directory).read(f"{LINEAR}.weight")


@pytest.mark.parametrize(
    "name", ["auto", "int8", "uint8", "float8_e4m3fn", "bool", "complex64", "torch.int64", "float64"]
)
def test_declared_dtype_must_be_one_of_weights(name):
    with pytest.raises(QADError, match=f"dtype is the text {name.removeprefix('torch.')!r}, expected bfloat16 or"):
        declared_dtype({"torch_dtype": name})


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"dtype": "torch.bfloat16"}, torch.bfloat16), ({"torch_dtype": "float16"}, torch.float16), ({}, None),
     ({"dtype": None, "torch_dtype": "float16"}, torch.float16), ({"dtype": None}, None)],
)  # fmt: skip
def test_declared_dtype(config, expected):
    assert declared_dtype(config) is expected
