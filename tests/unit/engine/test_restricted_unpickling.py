"""Checkpoints that would run code when read are refused; others are read."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_qad.engine import QADError, init_runtime

init_runtime()


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, file: Path):
        self._file = file

    def __reduce__(self):
        return Path.touch, (self._file,)


class Options:
    """A stand-in for the options that version 0.1 pickled with Megatron's arguments."""

    def __init__(self):
        self.qad_loss = "kl"


def read(directory: Path) -> dict:
    state = {"weight": torch.zeros(3), "object": io.BytesIO()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    return state


def save(directory: Path, value) -> None:
    dcp.save({"weight": torch.arange(3.0), "object": value}, checkpoint_id=directory, no_dist=True)


def test_ordinary_checkpoint_is_read(tmp_path):
    save(tmp_path / "c", ("a", 3))
    state = read(tmp_path / "c")
    assert state["weight"].tolist() == [0, 1, 2] and state["object"] == ("a", 3)


def test_code_in_metadata_is_refused(tmp_path):
    save(tmp_path / "c", "text")
    file, made = tmp_path / "c" / ".metadata", tmp_path / "made"
    metadata = dcp.FileSystemReader(tmp_path / "c").read_metadata()
    metadata.planner_data = Evil(made)
    file.write_bytes(pickle.dumps(metadata))
    pickle.loads(file.read_bytes())
    assert made.exists(), "the file is harmless, so this test shows nothing"
    made.unlink()
    with pytest.raises(QADError, match=r"\.metadata asks for pathlib\.\S*Path\.touch|asks for builtins.getattr"):
        dcp.FileSystemReader(tmp_path / "c").read_metadata()
    assert not made.exists()


def test_code_in_object_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "c", Evil(tmp_path / "made"))
    with pytest.raises(dcp.api.CheckpointException, match="Weights only load failed"):
        read(tmp_path / "c")
    assert not (tmp_path / "made").exists()
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    read(tmp_path / "c")
    assert (tmp_path / "made").exists(), "torch alone would not have run it, so the module is no longer needed"


def test_options_of_version_0_1_are_read_as_a_namespace(tmp_path):
    """They were pickled under the module's name of that time, which no longer exists."""
    file = tmp_path / "options.pt"
    torch.save({"args": Options()}, file)
    replaced = tmp_path / "replaced.pt"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(replaced, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                old = f"c{Options.__module__}\n{Options.__name__}\n".encode()
                assert old in data
                data = data.replace(old, b"cmegatron_qad.config.options\nQADOptions\n")
            target.writestr(name, data)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file)
    assert torch.load(replaced)["args"].qad_loss == "kl"
