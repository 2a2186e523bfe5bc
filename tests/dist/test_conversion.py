"""HF -> torch_dist -> load at any parallelism -> Megatron's save -> HF BF16 is byte-exact."""

import json
from pathlib import Path

import pytest
import torch
from made_models import CONVERTED, SAVED, SHARD_BYTES
from safetensors import safe_open

COPIED_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("case", CONVERTED)
@pytest.mark.parametrize("source", ["ranks1", "ranks2", *SAVED])
def test_round_trip_is_byte_exact(made, case, source):
    original, exported = _tensors(made.root / "hf" / case), _tensors(made.root / "out" / source / case)
    assert set(exported) == set(original)
    for name, tensor in original.items():
        assert exported[name].dtype == tensor.dtype == torch.bfloat16, name
        assert exported[name].shape == tensor.shape, name
        assert torch.equal(exported[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("case", CONVERTED)
@pytest.mark.parametrize("source", ["ranks2", *SAVED])
def test_config_tokenizer_and_generation_config_are_copied(made, case, source):
    original, exported = made.root / "hf" / case, made.root / "out" / source / case
    assert json.loads((exported / "config.json").read_text()) == json.loads((original / "config.json").read_text())
    for name in COPIED_FILES:
        assert (exported / name).read_bytes() == (original / name).read_bytes(), name


@pytest.mark.parametrize("case", CONVERTED)
def test_shards_are_bounded_and_indexed(made, case):
    directory = made.root / "out" / "tp2-pp2" / case
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 1
    assert {f.name for f in files} == set(index["weight_map"].values())
    total_bytes = 0
    for file in files:
        with safe_open(file, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == set(tensors)
        shard_bytes = sum(t.nbytes for t in tensors.values())
        assert shard_bytes <= SHARD_BYTES or len(tensors) == 1
        total_bytes += shard_bytes
    assert index["metadata"]["total_size"] == total_bytes


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                assert name not in tensors, f"{name} is in two shards"
                tensors[name] = handle.get_tensor(name)
    return tensors
