"""What every format of the registry promises, and that nothing but its own file names a format."""

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
def test_fake_quantization_is_quantize_and_dequantize_and_packs_to_itself(name, dtype):
    number, weight = NUMBER_FORMATS[name], weight_of(dtype)
    scale = number.scale_from_amax(tensor_amax(weight))
    quantized = number.fake_quant(weight, scale)
    assert not torch.equal(quantized, weight)
    assert torch.equal(number.dequantize(number.quantize(weight, scale, name="w"), scale, dtype), quantized)
    copy = weight.clone()
    number.fake_quant_list_([copy], scale.reshape(1), ["w"])
    assert torch.equal(copy, quantized)
    found, (codes,) = number.pack([quantized], name="w")
    assert torch.equal(number.dequantize(codes, found, dtype), quantized)
    assert number.is_representable(quantized, found) and not number.is_representable(weight, scale)
    with pytest.raises(NotRepresentableError, match="w: "):
        number.pack_representable(weight, scale, name="w")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_weights_of_one_scale_pack_together(name, dtype):
    number, parts = NUMBER_FORMATS[name], [weight_of(dtype, seed) for seed in (1, 2, 3)]
    shared = number.scale_from_amax(torch.stack([tensor_amax(part) for part in parts]).amax())
    quantized = [number.fake_quant(part, shared) for part in parts]
    scale, codes = number.pack(quantized, name="w")
    for part, of_part in zip(quantized, codes, strict=True):
        assert torch.equal(number.dequantize(of_part, scale, dtype), part)
    # One that moved since takes the others with it: they will be quantized again under the same scale.
    assert number.pack([*quantized[:2], parts[2]], name="w")[1] is None


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_a_weight_off_the_grid_has_the_scale_of_its_next_quantization(name):
    number, weight = NUMBER_FORMATS[name], weight_of(torch.float32)
    scale, codes = number.pack([weight], name="w")
    assert codes is None and torch.equal(scale, number.scale_from_amax(tensor_amax(weight)))
    assert torch.equal(number.as_exported(weight, name="w"), number.fake_quant(weight, scale))


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_weights_of_a_short_type_are_packed_once(name, monkeypatch):
    number, weight, names = NUMBER_FORMATS[name], weight_of(torch.bfloat16), []
    quantized = number.fake_quant(weight, number.scale_from_amax(tensor_amax(weight)))
    exact_codes = number.exact_codes

    def counted(weight, scale, *, name):
        names.append(name)
        return exact_codes(weight, scale, name=name)

    monkeypatch.setattr(number, "exact_codes", counted)
    assert number.pack([quantized] * 3, name="w")[1] is not None and names == ["w"] * 3


@pytest.mark.parametrize("fmt, layout", STORED)
def test_codes_have_the_shapes_and_dtypes_that_the_layout_declares(fmt, layout):
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
def test_bytes_of_the_table_are_those_of_the_stored_tensors(fmt, layout):
    expected = PACKED_LAYOUTS[layout].expected(fmt, 24, 256)
    num_bytes = sum(ITEM_BYTES[dtype] * torch.Size(shape).numel() for dtype, shape in expected.values())
    assert FORMATS[fmt].num_bytes(24, 256) == num_bytes


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
def test_the_validator_can_tell_formats_apart(layout):
    held = PACKED_LAYOUTS[layout].formats
    known = {name: stored.parts["weight"] for name, stored in held.items() if stored.is_known_by_dtype}
    for name, part in known.items():
        others = {other: stored.parts["weight"] for other, stored in held.items() if other != name}
        assert all(FORMATS[other].weight is FORMATS[name].weight for other, p in others.items() if p[1] == part[1])
    modelopt = [stored.algo for stored in PACKED_LAYOUTS["modelopt"].formats.values()]
    assert len(set(modelopt)) == len(modelopt)


def test_names_of_the_registry():
    assert all(name == fmt.name for name, fmt in FORMATS.items())
    assert exported_formats()[0] == UNQUANTIZED.name and not UNQUANTIZED.quantizes
    for layout in PACKED_LAYOUTS:
        assert exported_formats(layout) == (UNQUANTIZED.name, *PACKED_LAYOUTS[layout].formats)
        assert set(exported_formats(layout)) <= set(exported_formats()) <= set(FORMATS)
    assert FORMATS[DEFAULT_FORMAT].input is not None


def format_names() -> set[str]:
    """Every word by which anything calls a quantized format: policies, layouts' configurations, messages."""
    names = {name for name, fmt in FORMATS.items() if fmt.quantizes} | set(NUMBER_FORMATS)
    names |= {stored.algo for fmt in FORMATS.values() for stored in fmt.stored.values()}
    kv_formats = [fmt for fmt in KV_CACHE_FORMATS.values() if fmt is not None]
    names |= {fmt.name for fmt in kv_formats} | {s.algo for fmt in kv_formats for s in fmt.stored.values() if s.algo}
    return names | {name.upper() for name in names}


def literals(source: str) -> list[tuple[int, str]]:
    """Line and text of the strings that are a format's name, f-strings' parts among them."""
    names = format_names()
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return [(node.lineno, node.value) for node in found if isinstance(node.value, str) and node.value in names]


def is_of_a_format(file: Path) -> bool:
    """The arithmetic, the kernels and the description of one format, which may call it by its name."""
    number = {name.split("-")[0] for name in NUMBER_FORMATS}
    return file.parent == PACKAGE / "formats" and file.stem.split("_")[0] in number


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_format_is_named_in_its_own_files_only(file):
    if not is_of_a_format(file):
        found = literals(file.read_text())
        assert not found, f"{file}: ask formats.registry in place of comparing with {found}"


@pytest.mark.parametrize(
    "source", ['x == "fp8"', "{'nvfp4': 1}", 'f(kind="FP8")', 'def f(x="int4-w4a16"): ...', '["nvfp4-pack-quantized"]']
)
def test_a_literal_is_seen_wherever_it_stands(source):
    assert len(literals(source)) == 1


def test_prose_is_no_literal():
    assert not literals('"""Weights in NVFP4."""\nraise ValueError("no tensor is NVFP4 or FP8")\n"bf16"')
