"""The steps of docs/howto/add_a_format.md, run with the code on that page: all of them together work everywhere, and
each of them is required."""

import json
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from modelopt.torch.quantization.nn.modules.tensor_quantizer import unregister_quant_backend
from safetensors.torch import load_file
from tiny_configs import NARROW_LLAMA as CONFIG

from megatron_qad.checkpoint.export_hf import Export
from megatron_qad.checkpoint.hf_writer import write_hf_checkpoint
from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine import QADError
from megatron_qad.formats.common import tensor_amax
from megatron_qad.formats.format import LinearFormat, NumberFormat
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.models.families import family_of
from megatron_qad.quantization import policy as policies
from megatron_qad.quantization.activations import ActivationQuantizers
from megatron_qad.quantization.format_table import BF16_BYTES, format_rows
from megatron_qad.quantization.in_place_weights import InPlaceWeights

PAGE = Path(__file__).parents[3] / "docs" / "howto" / "add_a_format.md"
NAME = "int8"
FAMILY = family_of(CONFIG)
LINEARS = FAMILY.linears(CONFIG)
QUANTIZED = [linear for linear in LINEARS if linear.kind != "head"]


@pytest.fixture
def new_format() -> Iterator[LinearFormat]:
    """Build the format of the page's code block (steps 1 to 3)."""
    (block,) = re.findall(r"^ *```python\n(.*?)^ *```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    module = types.ModuleType("int8_format")
    exec(compile(textwrap.dedent(block), str(PAGE), "exec"), module.__dict__)
    (fmt,) = (value for value in vars(module).values() if isinstance(value, LinearFormat))
    yield fmt
    unregister_quant_backend(f"megatron_qad_{NAME}")


@dataclass
class Saved:
    """In-memory replacement for ``TorchDistReader``."""

    tensors: dict[str, torch.Tensor]
    directory: str = "memory"

    def layers(self, maps):
        return ((tensor_map, self.tensors[tensor_map.megatron]) for tensor_map in maps)


def make_chunk() -> torch.nn.Module:
    """Return a module with the linears of the model, under Megatron's names."""
    generator = torch.Generator().manual_seed(0)
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList()
    for linear in LINEARS:
        at, parts = chunk, linear.megatron.removesuffix(".weight").split(".")
        if linear.layer is not None:
            while len(chunk.decoder.layers) <= linear.layer:
                chunk.decoder.layers.append(torch.nn.Module())
                chunk.decoder.layers[-1].layer_number = len(chunk.decoder.layers)
            at, parts = chunk.decoder.layers[linear.layer], parts[3:]
        for part in parts[:-1]:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(parts[-1], torch.nn.Linear(linear.shape[1], linear.shape[0], bias=False, dtype=torch.bfloat16))
        getattr(at, parts[-1]).weight.data = torch.randn(linear.shape, generator=generator).bfloat16()
    return chunk


def resolve(directory: Path) -> dict[str, str]:
    (directory / "policy.yaml").write_text(
        f"rules:\n  - {{kind: [attention, mlp], format: {NAME}}}\n  - {{kind: head, format: bf16}}\n"
    )
    policy = policies.load(str(directory / "policy.yaml"))
    return policies.resolve(policy, LINEARS, FAMILY.layer_kinds(CONFIG))


def follow_steps(directory: Path, *, save_quantized: bool = True) -> None:
    """Run all steps from a policy to a checkpoint that the validator accepts.

    Args:
        save_quantized: export quantized weights; if false, the weights of ``make_chunk``, as after an optimizer step.
    """
    formats = resolve(directory)
    assert {formats[linear.megatron] for linear in QUANTIZED} == {NAME}
    check_table(formats)
    check_inputs(formats)
    before, quantized = quantize_in_place(formats)
    check_export(formats, quantized if save_quantized else before, quantized, directory / "out")


def check_table(formats: dict[str, str]) -> None:
    for row in format_rows(QUANTIZED, formats):
        rows, columns = row.shape
        assert row.bytes_before == BF16_BYTES * rows * columns
        assert row.bytes_after == rows * columns + 2 * 4 * len(row.hf)  # one byte per element, two scales per linear


def check_inputs(formats: dict[str, str]) -> None:
    chunk = make_chunk()
    inputs = ActivationQuantizers([chunk], formats)
    assert {f"{name}.weight" for name in inputs.quantizers} == {linear.megatron for linear in QUANTIZED}
    generator = torch.Generator().manual_seed(1)
    batches = {}
    with inputs.calibrating():
        for name in inputs.quantizers:
            linear = chunk.get_submodule(name)
            batches[name] = torch.randn(3, linear.in_features, generator=generator).bfloat16()
            linear(batches[name])
    for name, x in batches.items():
        scale = tensor_amax(x) / 127
        rounded = ((x.float() / scale).round() * scale).bfloat16()
        assert torch.equal(inputs.quantizers[name](x), rounded) and not torch.equal(rounded, x)


def quantize_in_place(formats: dict[str, str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights before and after in-place quantization, by name."""
    weights = InPlaceWeights([make_chunk()], formats)
    before = {name: weight.detach().clone() for name, weight in weights.weights.items()}
    assert set(before) == {linear.megatron for linear in QUANTIZED}
    weights.quantize_()
    for name, weight in weights.weights.items():
        scale = tensor_amax(before[name]) / 127
        assert torch.equal(weight, ((before[name].float() / scale).round() * scale).bfloat16())
        assert not torch.equal(weight, before[name])
    return before, {name: weight.detach() for name, weight in weights.weights.items()}


def check_export(formats: dict[str, str], saved: dict, quantized: dict, output: Path) -> None:
    maps, generator = FAMILY.tensors(CONFIG), torch.Generator().manual_seed(2)
    tensors = {m.megatron: torch.randn(m.shape, generator=generator).bfloat16() for m in maps} | saved
    amaxes = {f"{linear.megatron_module}.input_quantizer._amax": torch.tensor([2.54]) for linear in QUANTIZED}
    export = Export(Saved(tensors), "modelopt", formats, "bf16", {}, torch.bfloat16, amaxes)
    linear_modules = FAMILY.linear_modules(CONFIG)
    write_hf_checkpoint(export.items(maps), output, config=CONFIG, layout="modelopt", linear_modules=linear_modules)

    stored = load_file(output / "model.safetensors")
    for linear in QUANTIZED:
        for name, part in zip(linear.hf, linear.to_hf(quantized[linear.megatron]), strict=True):
            assert stored[name].dtype == torch.int8
            assert torch.equal((stored[name].float() * stored[f"{name}_scale"]).bfloat16(), part)
            assert stored[f"{name.removesuffix('.weight')}.input_scale"] == torch.tensor(2.54) / 127
    quantization = json.loads((output / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "INT8" and quantization["group_size"] is None

    result = validate_nvfp4(output, with_sums=False)
    assert not result.issues, "\n".join(map(str, result.issues))
    assert result.quantized == dict.fromkeys((hf.removesuffix(".weight") for x in QUANTIZED for hf in x.hf), NAME)


def without(fmt: LinearFormat, role: str) -> LinearFormat:
    stored = fmt.stored["modelopt"]
    parts = {other: part for other, part in stored.parts.items() if other != role}
    return replace(fmt, stored={"modelopt": replace(stored, parts=parts)})


@pytest.mark.parametrize("save_quantized", [True, False], ids=["saved quantized", "saved after an optimizer step"])
def test_format_from_page_works_everywhere(tmp_path, monkeypatch, new_format, save_quantized):
    monkeypatch.setitem(FORMATS, NAME, new_format)
    follow_steps(tmp_path, save_quantized=save_quantized)


def test_export_packs_each_weight_once(tmp_path, monkeypatch, new_format):
    monkeypatch.setitem(FORMATS, NAME, new_format)
    formats, quantize, shapes = resolve(tmp_path), new_format.weight.quantize, []
    _, quantized = quantize_in_place(formats)

    def counted(x, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return quantize(x, *args, **kwargs)

    monkeypatch.setattr(new_format.weight, "quantize", counted)
    check_export(formats, quantized, quantized, tmp_path / "out")
    assert shapes == [shape for linear in QUANTIZED for shape in linear.hf_shapes()]


def test_registry_line_is_required(tmp_path, new_format):
    with pytest.raises(QADError, match="unknown format 'int8'"):
        follow_steps(tmp_path)


@pytest.mark.parametrize("method", ["scale_from_amax", "quantize", "dequantize", "shapes"])
def test_each_of_the_four_methods_is_required(tmp_path, monkeypatch, new_format, method):
    monkeypatch.setitem(FORMATS, NAME, new_format)
    monkeypatch.delattr(type(new_format.weight), method)
    with pytest.raises(NotImplementedError):
        follow_steps(tmp_path)


@pytest.mark.parametrize("field", ["name", "bits", "input_attributes"])
def test_each_field_is_required(tmp_path, monkeypatch, new_format, field):
    monkeypatch.setitem(FORMATS, NAME, new_format)
    monkeypatch.delattr(type(new_format.weight), field)
    with pytest.raises((AttributeError, TypeError)):
        follow_steps(tmp_path)


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda fmt: replace(fmt, stored={}), QADError),
        (lambda fmt: replace(fmt, weight=None), AssertionError),
        (lambda fmt: replace(fmt, input=None), AssertionError),
        (lambda fmt: without(fmt, "weight"), KeyError),
        (lambda fmt: without(fmt, "weight_scale"), KeyError),
        (lambda fmt: without(fmt, "input_scale"), KeyError),
    ],
    ids=["stored", "weight", "input", "stored weight", "stored weight_scale", "stored input_scale"],
)
def test_each_part_of_linear_format_is_required(tmp_path, monkeypatch, new_format, change, error):
    monkeypatch.setitem(FORMATS, NAME, change(new_format))
    with pytest.raises(error):
        follow_steps(tmp_path)


def test_names_on_page_exist():
    text = PAGE.read_text()
    for attribute in ("block_size", "input_attributes", "tensor_bytes"):
        assert attribute in text and hasattr(NumberFormat, attribute)
    for method in ("scale_from_amax", "quantize", "dequantize", "shapes", "fake_quant_list_", "exact_codes"):
        assert method in text and hasattr(NumberFormat, method)
    root = PAGE.parents[2]
    for file in re.findall(r"`((?:megatron_qad|tests)/[\w/]+\.py)`", text):
        assert (root / file).is_file(), file
