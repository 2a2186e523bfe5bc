import sys
from pathlib import Path

from megatron_qad.engine import init_runtime

sys.path.append(str(Path(__file__).parents[2] / "dist"))  # tiny_models
init_runtime()  # the test modules import megatron, and are imported after this file

import pytest  # noqa: E402
import torch  # noqa: E402

from megatron_qad.checkpoint.expected_tensors import inventory  # noqa: E402
from megatron_qad.checkpoint.layouts import exclusions  # noqa: E402
from megatron_qad.models.families import family_of  # noqa: E402


@pytest.fixture
def assert_same_tensors():
    """Return a check that a family's name map and the validator's independent inventory of a config agree."""

    def check(config: dict) -> None:
        family, expected = family_of(config), inventory(config)
        tensors, linears = family.tensors(config), family.linears(config)
        mapped = {name: shape for t in tensors for name, shape in zip(t.hf, t.hf_shapes(), strict=True)}
        head = linears[-1]
        expected_shapes = {
            **expected.tensors,
            **{f"{module}.weight": shape for module, shape in expected.linears.items()},
        }
        if expected.tied_head:
            assert expected_shapes.pop(f"{expected.head}.weight") == mapped[expected.embedding]
        assert mapped == expected_shapes
        assert (head.is_tied, head.hf) == (expected.tied_head, (f"{expected.head}.weight",))
        assert {name for t in linears for name in t.hf} == {f"{module}.weight" for module in expected.linears}
        assert {t.hf for t in linears if len(t.hf) > 1} == {tuple(f"{m}.weight" for m in g) for g in expected.fused}
        assert {name for t in tensors if t.is_float32 for name in t.hf} == expected.float32
        modules = {name for name in family.linear_modules(config) if not expected.is_passthrough(name)}
        assert set(exclusions(modules, ())) == expected.excluded(quantized=())
        assert {t.megatron: t.shape for t in family.passthrough_tensors(config)} == expected.carried

    return check


@pytest.fixture
def assert_round_trip():
    """Return a check that random Hugging Face tensors of a config survive a conversion to Megatron and back."""

    def check(config: dict) -> None:
        generator = torch.Generator().manual_seed(0)
        for tensor in family_of(config).tensors(config):
            parts = [torch.randn(shape, generator=generator) for shape in tensor.hf_shapes()]
            joined = tensor.to_megatron(parts)
            assert tuple(joined.shape) == tensor.shape
            assert all(torch.equal(a, b) for a, b in zip(tensor.to_hf(joined), parts, strict=True))

    return check
