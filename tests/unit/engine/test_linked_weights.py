"""Checkpoints that share the files of others."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest
from megatron_qad.engine.run_directory.linked_weights import LinkedWeights


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    checkpoint.save(tensors, checkpoint_id=directory, no_dist=True)
    manifest.write_manifest(directory)
    return directory


def load(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoint.load(loaded, checkpoint_id=directory, no_dist=True)
    return loaded


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(4, 6) for name in names}


def test_tensors_of_several_checkpoints_are_read_from_one(tmp_path):
    own, first, second = tensors("a", "b"), tensors("c", "d", "left out"), tensors("e")
    target = save(tmp_path / "target", own)
    sums = LinkedWeights(save(tmp_path / "first", first), ["c", "d"]).add_to(target)
    sums |= LinkedWeights(save(tmp_path / "second", second), ["e"]).add_to(target)
    assert sorted(sums) == ["weights1__0_0.distcp", "weights__0_0.distcp"]
    assert sums == manifest.sums_of(target, list(sums))
    assert all((target / name).stat().st_nlink == 2 for name in sums)
    del first["left out"]
    expected = own | first | second
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load(target, expected).items())
    with pytest.raises(CheckpointException, match="left out"):
        load(target, tensors("left out"))


def test_files_of_another_file_system_are_copied(tmp_path):
    elsewhere = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        if os.stat(elsewhere).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("/dev/shm is not another file system")
        weights = tensors("c")
        source, target = save(elsewhere / "source", weights), save(tmp_path / "target", tensors("a"))
        (name,) = LinkedWeights(source, ["c"]).add_to(target)
        assert (target / name).stat().st_nlink == 1
        assert torch.equal(load(target, weights)["c"], weights["c"])
        (file,) = source.glob("*.distcp")
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        with pytest.raises(QADError, match="differs from .*of which it is a copy"):
            LinkedWeights(source, ["c"]).add_to(save(tmp_path / "other", tensors("a")))
    finally:
        shutil.rmtree(elsewhere)


def test_names_that_do_not_fit_are_errors(tmp_path):
    source, target = save(tmp_path / "source", tensors("a", "b")), save(tmp_path / "target", tensors("a"))
    with pytest.raises(QADError, match="no tensor 'c'"):
        LinkedWeights(source, ["b", "c"]).add_to(target)
    with pytest.raises(QADError, match="already has a tensor 'a'"):
        LinkedWeights(source, ["a", "b"]).add_to(target)
