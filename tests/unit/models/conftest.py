import sys
from pathlib import Path

from megatron_qad.engine import init_runtime

sys.path.append(str(Path(__file__).parents[2] / "dist"))  # tiny_models
init_runtime()  # the test modules import megatron, and are imported after this file

import pytest  # noqa: E402
import torch  # noqa: E402

from megatron_qad.checkpoint.expected_tensors import inventory  # noqa: E402
from megatron_qad.models.families import family_of  # noqa: E402


@pytest.fixture
def assert_same_tensors():
    """assert_same_tensors(config): a family's name map and the validator's inventory, written apart, agree."""

    def check(config: dict) -> None:
        family, listed = family_of(config), inventory(config)
        tensors, linears = family.tensors(config), family.linears(config)
        mapped = {name: shape for t in tensors for name, shape in zip(t.hf, t.hf_shapes(), strict=True)}
        head = linears[-1]
        named = {**listed.tensors, **{f"{module}.weight": shape for module, shape in listed.linears.items()}}
        if listed.tied_head:
            assert named.pop(f"{listed.head}.weight") == mapped[listed.embedding]
        assert mapped == named
        assert (head.is_tied, head.hf) == (listed.tied_head, (f"{listed.head}.weight",))
        assert {name for t in linears for name in t.hf} == {f"{module}.weight" for module in listed.linears}
        assert {t.hf for t in linears if len(t.hf) > 1} == {tuple(f"{m}.weight" for m in g) for g in listed.fused}
        assert {name for t in tensors if t.is_float32 for name in t.hf} == listed.float32
        modules = {name for name in family.linear_modules(config) if not listed.is_passthrough(name)}
        assert modules == listed.excluded(quantized=())

    return check


@pytest.fixture
def assert_round_trip():
    """assert_round_trip(config): random Hugging Face tensors -> Megatron -> the same tensors, bit for bit."""

    def check(config: dict) -> None:
        generator = torch.Generator().manual_seed(0)
        for tensor in family_of(config).tensors(config):
            parts = [torch.randn(shape, generator=generator) for shape in tensor.hf_shapes()]
            joined = tensor.to_megatron(parts)
            assert tuple(joined.shape) == tensor.shape
            assert all(torch.equal(a, b) for a, b in zip(tensor.to_hf(joined), parts, strict=True))

    return check
