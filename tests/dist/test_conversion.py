"""HF -> torch_dist -> any parallel layout -> Megatron's save -> HF BF16 gives back every byte."""

import json
from pathlib import Path

import pytest
import torch
from made_models import CONVERTED, SAVED, SHARD_BYTES
from safetensors import safe_open

CARRIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("case", CONVERTED)
@pytest.mark.parametrize("source", ["ranks1", "ranks2", *SAVED])
def test_round_trip_is_byte_exact(made, case, source):
    given, found = _tensors(made.root / "hf" / case), _tensors(made.root / "out" / source / case)
    assert set(found) == set(given)
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("case", CONVERTED)
@pytest.mark.parametrize("source", ["ranks2", *SAVED])
def test_config_tokenizer_and_generation_config_come_along(made, case, source):
    given, found = made.root / "hf" / case, made.root / "out" / source / case
    assert json.loads((found / "config.json").read_text()) == json.loads((given / "config.json").read_text())
    for name in CARRIED:
        assert (found / name).read_bytes() == (given / name).read_bytes(), name


@pytest.mark.parametrize("case", CONVERTED)
def test_shards_are_bounded_and_indexed(made, case):
    directory = made.root / "out" / "tp2-pp2" / case
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 1
    assert {f.name for f in files} == set(index["weight_map"].values())
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(tensors)
        data = sum(t.nbytes for t in tensors.values())
        assert data <= SHARD_BYTES or len(tensors) == 1
        total += data
    assert index["metadata"]["total_size"] == total


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                assert name not in found, f"{name} is in two shards"
                found[name] = handle.get_tensor(name)
    return found
