"""Temporary files and directories are never opened through a link that someone planted under their name."""

import json
import time
from pathlib import Path

import pytest

from megatron_qad.engine import init_runtime
from megatron_qad.engine.heartbeat import Heartbeat
from megatron_qad.engine.run_directory import manifest, new_files

init_runtime()


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file of another directory, which must stay as it is."""
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    (directory / "victim").write_text("mine")
    yield directory / "victim"
    assert [path.name for path in directory.iterdir()] == ["victim"] and (directory / "victim").read_text() == "mine"


def plant(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def test_records_and_trackers(tmp_path, victim):
    file = tmp_path / "run" / "qad.json"
    plant(file.with_name("qad.json.new"), victim)
    manifest.write_atomically(file, "ours")
    assert file.read_text() == "ours" and [path.name for path in file.parent.iterdir()] == ["qad.json"]


def test_copied_model_files(tmp_path, victim):
    from megatron_qad.training.run_description import _copy_atomically

    source, target = tmp_path / "source", tmp_path / "run" / "tokenizer.json"
    source.write_text("ours")
    source.chmod(0o640)
    plant(Path(f"{target}.partial"), victim)
    _copy_atomically(str(source), str(target))
    assert target.read_text() == "ours" and not target.is_symlink()
    assert target.stat().st_mode == source.stat().st_mode and target.stat().st_mtime_ns == source.stat().st_mtime_ns


def test_heartbeats(tmp_path, victim):
    heartbeat, file = Heartbeat(), tmp_path / "job" / "rank_00000.json"
    plant(file.with_suffix(".new"), victim)
    heartbeat.start(file.parent, 0, 1, 60)
    end = time.monotonic() + 10
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.01)
    heartbeat.stop()
    assert json.loads(file.read_text())["rank"] == 0 and not file.is_symlink()


@pytest.mark.parametrize("target", ["elsewhere", "elsewhere/victim", "elsewhere/none"])
def test_directories(tmp_path, victim, target):
    link = tmp_path / ".out.partial"
    link.symlink_to(tmp_path / target)
    new_files.make_new_directory(link)
    assert link.is_dir() and not link.is_symlink() and not list(link.iterdir())


def test_leftovers_of_killed_processes_are_replaced(tmp_path):
    (tmp_path / "directory" / "sub").mkdir(parents=True)
    new_files.make_new_directory(tmp_path / "directory")
    assert not list((tmp_path / "directory").iterdir())
    (tmp_path / "file").write_text("old and long")
    with new_files.open_new(tmp_path / "file") as stream:
        stream.write("new")
    assert (tmp_path / "file").read_text() == "new"


def test_file_that_appears_meanwhile_is_an_error(tmp_path, victim, monkeypatch):
    """Another process plants the link between the removal and the creation."""
    file, unlink = tmp_path / "file", Path.unlink

    def unlink_and_plant(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        path.symlink_to(victim)

    monkeypatch.setattr(Path, "unlink", unlink_and_plant)
    with pytest.raises(FileExistsError):
        new_files.open_new(file)
