"""Properties of every format in the registry. Only a format's own files may contain its name."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from megatron_qad.checkpoint.hf_directory import ITEM_BYTES
from megatron_qad.checkpoint.layouts import PACKED_LAYOUTS
from megatron_qad.formats.common import NotRepresentableError, tensor_amax
from megatron_qad.formats.format_registry import (
    DEFAULT_FORMAT,
    FORMATS,
    KV_CACHE_FORMATS,
    UNQUANTIZED,
    exported_formats,
)

PACKAGE = Path(__file__).parents[3] / "megatron_qad"
NUMBER_FORMATS = {
    number.name: number for fmt in FORMATS.values() for number in (fmt.weight, fmt.input) if number is not None
}
STORED = [(name, layout) for name, fmt in FORMATS.items() for layout in fmt.stored]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weight_of(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(24, 256, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_fake_quant_equals_quantize_dequantize_and_packs_exactly(name, dtype):
    number, weight = NUMBER_FORMATS[name], weight_of(dtype)
    scale = number.scale_from_amax(tensor_amax(weight))
    quantized = number.fake_quant(weight, scale)
    assert not torch.equal(quantized, weight)
    assert torch.equal(number.dequantize(number.quantize(weight, scale, name="w"), scale, dtype), quantized)
    copy = weight.clone()
    number.fake_quant_list_([copy], scale.reshape(1), ["w"])
    assert torch.equal(copy, quantized)
    recovered, (codes,) = number.pack([quantized], name="w")
    assert torch.equal(number.dequantize(codes, recovered, dtype), quantized)
    assert number.is_representable(quantized, recovered) and not number.is_representable(weight, scale)
    with pytest.raises(NotRepresentableError, match="w: "):
        number.pack_representable(weight, scale, name="w")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_weights_with_shared_scale_pack_together(name, dtype):
    number, parts = NUMBER_FORMATS[name], [weight_of(dtype, seed) for seed in (1, 2, 3)]
    shared = number.scale_from_amax(torch.stack([tensor_amax(part) for part in parts]).amax())
    quantized = [number.fake_quant(part, shared) for part in parts]
    scale, codes = number.pack(quantized, name="w")
    for part, part_codes in zip(quantized, codes, strict=True):
        assert torch.equal(number.dequantize(part_codes, scale, dtype), part)
    # If one changed since, none is packed: all will be quantized again with the same scale.
    assert number.pack([*quantized[:2], parts[2]], name="w")[1] is None


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_unrepresentable_weight_gets_scale_of_next_quantization(name):
    number, weight = NUMBER_FORMATS[name], weight_of(torch.float32)
    scale, codes = number.pack([weight], name="w")
    assert codes is None and torch.equal(scale, number.scale_from_amax(tensor_amax(weight)))
    assert torch.equal(number.as_exported(weight, name="w"), number.fake_quant(weight, scale))


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_bfloat16_weights_are_packed_once(name, monkeypatch):
    number, weight, names = NUMBER_FORMATS[name], weight_of(torch.bfloat16), []
    quantized = number.fake_quant(weight, number.scale_from_amax(tensor_amax(weight)))
    exact_codes = number.exact_codes

    def counted(weight, scale, *, name):
        names.append(name)
        return exact_codes(weight, scale, name=name)

    monkeypatch.setattr(number, "exact_codes", counted)
    assert number.pack([quantized] * 3, name="w")[1] is not None and names == ["w"] * 3


@pytest.mark.parametrize("fmt, layout", STORED)
def test_codes_have_shapes_and_dtypes_of_export_layout(fmt, layout):
    number, stored, weight = FORMATS[fmt].weight, FORMATS[fmt].stored[layout], weight_of(torch.bfloat16)
    codes = number.quantize(weight, number.scale_from_amax(tensor_amax(weight)), name="w")
    assert {role: tuple(tensor.shape) for role, tensor in codes.items()} == number.shapes(*weight.shape)
    scalars = ["weight_scale"] * ("weight_scale" in stored.parts) + ["input_scale"] * (FORMATS[fmt].input is not None)
    assert list(stored.parts) == [*codes, *scalars]
    header = save(codes)
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert {role: header[role]["dtype"] for role in codes} == {role: stored.parts[role][1] for role in codes}
    assert all(dtype in ITEM_BYTES for _, dtype in stored.parts.values())
    assert len({part for part, _ in stored.parts.values()}) == len(stored.parts)


@pytest.mark.parametrize("fmt, layout", STORED)
def test_num_bytes_equals_size_of_stored_tensors(fmt, layout):
    expected = PACKED_LAYOUTS[layout].expected(fmt, 24, 256)
    num_bytes = sum(ITEM_BYTES[dtype] * torch.Size(shape).numel() for dtype, shape in expected.values())
    assert FORMATS[fmt].num_bytes(24, 256) == num_bytes


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_formats_of_export_layout_are_distinguishable(layout):
    held = PACKED_LAYOUTS[layout].formats
    known = {name: stored.parts["weight"] for name, stored in held.items() if stored.is_known_by_dtype}
    for name, part in known.items():
        others = {other: stored.parts["weight"] for other, stored in held.items() if other != name}
        assert all(FORMATS[other].weight is FORMATS[name].weight for other, p in others.items() if p[1] == part[1])
    modelopt = [stored.algo for stored in PACKED_LAYOUTS["modelopt"].formats.values()]
    assert len(set(modelopt)) == len(modelopt)


def test_registry_names():
    assert all(name == fmt.name for name, fmt in FORMATS.items())
    assert exported_formats()[0] == UNQUANTIZED.name and not UNQUANTIZED.quantizes
    for layout in PACKED_LAYOUTS:
        assert exported_formats(layout) == (UNQUANTIZED.name, *PACKED_LAYOUTS[layout].formats)
        assert set(exported_formats(layout)) <= set(exported_formats()) <= set(FORMATS)
    assert FORMATS[DEFAULT_FORMAT].input is not None


def format_names() -> set[str]:
    """Return all names of quantized formats in policies, export configurations and messages."""
    names = {name for name, fmt in FORMATS.items() if fmt.quantizes} | set(NUMBER_FORMATS)
    names |= {stored.algo for fmt in FORMATS.values() for stored in fmt.stored.values()}
    kv_formats = [fmt for fmt in KV_CACHE_FORMATS.values() if fmt is not None]
    names |= {fmt.name for fmt in kv_formats} | {s.algo for fmt in kv_formats for s in fmt.stored.values() if s.algo}
    return names | {name.upper() for name in names}


def literals(source: str) -> list[tuple[int, str]]:
    """Return line and text of the string literals, including parts of f-strings, that are names of formats."""
    names = format_names()
    constants = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [(node.lineno, node.value) for node in constants if isinstance(node.value, str) and node.value in names]


def is_of_a_format(file: Path) -> bool:
    """Whether ``file`` may contain the name of a format: it is the arithmetic, kernels or description of one, or it
    recognizes the quantization methods of other programs, some of which have the same names."""
    if file == PACKAGE / "checkpoint" / "source_quantization.py":
        return True
    number = {name.split("-")[0] for name in NUMBER_FORMATS}
    return file.parent == PACKAGE / "formats" and file.stem.split("_")[0] in number


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_format_name_occurs_only_in_its_own_files(file):
    if not is_of_a_format(file):
        names = literals(file.read_text())
        assert not names, f"{file}: contains the format names {names}. Use formats.format_registry instead."


@pytest.mark.parametrize(
    "source", ['x == "fp8"', "{'nvfp4': 1}", 'f(kind="FP8")', 'def f(x="int4-w4a16"): ...', '["nvfp4-pack-quantized"]']
)
def test_format_name_literal_is_detected(source):
    assert len(literals(source)) == 1


def test_format_name_in_prose_is_ignored():
    assert not literals('"""Weights in NVFP4."""\nraise ValueError("no tensor is NVFP4 or FP8")\n"bf16"')
