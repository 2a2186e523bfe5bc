"""Checkpoints that would run code when read are refused; others are read."""

import datetime
import io
import pickle
import zipfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import default_planner

from megatron_qad.engine import QADError, init_runtime
from megatron_qad.engine.run_directory.restricted_unpickling import one_error
from megatron_qad.engine.system_errors import explain

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


def test_plans_of_all_ranks_in_metadata_are_read(tmp_path):
    """Megatron attaches them to the metadata. torch 2.12 writes such attributes; 2.11 drops them."""
    save(tmp_path / "c", "text")
    metadata = dcp.FileSystemReader(tmp_path / "c").read_metadata()
    state = {"weight": torch.arange(3.0), "object": "text"}
    metadata.all_local_plans = [default_planner.create_default_local_save_plan(state, is_coordinator=True)]
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(metadata))
    assert read(tmp_path / "c")["object"] == "text"


def test_code_in_metadata_is_refused(tmp_path):
    save(tmp_path / "c", "text")
    file, made = tmp_path / "c" / ".metadata", tmp_path / "made"
    metadata = dcp.FileSystemReader(tmp_path / "c").read_metadata()
    metadata.planner_data = Evil(made)
    file.write_bytes(pickle.dumps(metadata))
    pickle.loads(file.read_bytes())
    assert made.exists(), "the file is harmless, so this test shows nothing"
    made.unlink()
    assert f"{file} asks for pathlib.Path.touch, which does not belong in a checkpoint" in error_of(tmp_path / "c")
    assert not made.exists()


def error_of(directory: Path) -> str:
    """Return the error with which reading a checkpoint ends, as an entry point prints it."""
    with pytest.raises((QADError, dcp.api.CheckpointException)) as raised:
        read(directory)
    message = explain(raised.value)
    assert "weights_only" not in message and "\n" not in message
    return message


def test_code_in_object_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "c", Evil(tmp_path / "made"))
    message = error_of(tmp_path / "c")
    assert message.startswith(f"{tmp_path}/c/__0_0.distcp asks for getattr, which does not belong in a checkpoint")
    assert not (tmp_path / "made").exists()
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    read(tmp_path / "c")
    assert (tmp_path / "made").exists(), "torch alone would not have run it, so the module is no longer needed"


def test_object_of_another_class_is_refused_by_name(tmp_path):
    save(tmp_path / "c", Options())  # as modelopt_state
    assert f"{tmp_path}/c/__0_0.distcp asks for {__name__}.Options, which" in error_of(tmp_path / "c")


@pytest.mark.parametrize(
    "value", [Options(), Fraction(1), {"args": [datetime.timedelta(1)]}], ids=lambda value: type(value).__name__
)
def test_object_in_common_pt_is_refused_by_name(tmp_path, value):
    from megatron.core.dist_checkpointing.serialization import load_common_state_dict

    save(tmp_path / "c", "text")
    (tmp_path / "c" / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({"state": value}, tmp_path / "c" / "common.pt")
    with pytest.raises(QADError, match=f"{tmp_path}/c/common.pt asks for [a-zA-Z_.]+, which does not") as raised:
        load_common_state_dict(str(tmp_path / "c"))
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" + b[1:], lambda b: b"cos\nsystem\n."]
)
@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_damaged_pickle_is_one_error(tmp_path, name, damage):
    save(tmp_path / "c", "text")
    file = tmp_path / "c" / name
    if name == "common.pt":
        torch.save({"iteration": 7}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(QADError, match=f"{file} (is damaged|asks for)"):
        with one_error():
            read(tmp_path / "c") if name == ".metadata" else torch.load(file)


@pytest.mark.parametrize("content", [None, 7, ["a"], {"state_dict_metadata": {}}], ids=repr)
def test_metadata_of_another_type_is_one_error(tmp_path, content):
    save(tmp_path / "c", "text")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(content))
    assert f"{tmp_path}/c/.metadata is damaged, or is not the index of a checkpoint" in error_of(tmp_path / "c")


def rename_in_metadata(directory: Path, path: str) -> None:
    """Make ``.metadata`` name ``path`` as the file of all tensors."""
    metadata = dcp.FileSystemReader(directory).read_metadata()
    for storage in metadata.storage_data.values():
        storage.relative_path = path
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize(
    "path", ["../other.distcp", "{}/other.distcp", "sub/../../other.distcp", "sub/file", "..", "", "./a"]
)
def test_file_outside_of_the_checkpoint_is_refused(tmp_path, path):
    save(tmp_path / "c", "text")
    (tmp_path / "c" / "sub").mkdir()
    (tmp_path / "other.distcp").write_bytes((tmp_path / "c" / "__0_0.distcp").read_bytes())
    rename_in_metadata(tmp_path / "c", path := path.format(tmp_path))
    assert f"{tmp_path}/c/.metadata names the file {path!r}, expected files in its own" in error_of(tmp_path / "c")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_link_that_leads_out_is_refused(tmp_path, name):
    save(tmp_path / "c", "text")
    (tmp_path / "c" / name).rename(tmp_path / "outside")
    (tmp_path / "c" / name).symlink_to("../outside")
    assert f"{tmp_path}/c/{name} is a link that leads out of the checkpoint, to ../outside." in error_of(tmp_path / "c")


def test_checkpoint_may_be_a_link(tmp_path):
    save(tmp_path / "c", "text")
    (tmp_path / "c" / "__0_0.distcp").rename(tmp_path / "c" / "data")
    (tmp_path / "c" / "__0_0.distcp").symlink_to("data")
    (tmp_path / "link").symlink_to("c")
    assert read(tmp_path / "link")["object"] == "text"


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
    with pytest.raises(QADError, match=f"{file} asks for {__name__}.Options"):
        torch.load(file)
    assert torch.load(replaced)["args"].qad_loss == "kl"
