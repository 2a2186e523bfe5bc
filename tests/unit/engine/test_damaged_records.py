"""Small JSON files of a run directory that are nested too deeply, of another encoding or shape: one error, or ignored
where the file only informs."""

import json

import pytest

from megatron_qad.engine import QADError
from megatron_qad.engine.run_directory import json_records, locks, manifest
from megatron_qad.engine.run_directory.run_files import JOB_FILE, read_record
from megatron_qad.models.checkpoint_config import read_config
from megatron_qad.report.event_files import _parse

BAD = [b"[" * 100_000, b'{"a":' * 300 + b"1" + b"}" * 300, b"\xff\xfe{\x00", b"{", b"", b"[1]", b"1" * 5000, b"null"]


@pytest.mark.parametrize("content", BAD)
def test_records(tmp_path, content):
    (tmp_path / JOB_FILE).write_bytes(content)
    with pytest.raises(QADError, match=f"{JOB_FILE}: (is damaged|not UTF-8)"):
        json_records.read(tmp_path / JOB_FILE)
    with pytest.raises(QADError, match=r"\w.*[.)\w] Restore it from a copy\.$") as raised:
        read_record(tmp_path, JOB_FILE)
    assert ".." not in str(raised.value)


@pytest.mark.parametrize("content", BAD)
def test_manifests(tmp_path, content):
    (tmp_path / manifest.FILE).write_bytes(content)
    with pytest.raises(QADError, match="integrity.json is not readable"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("content", [b'{"files": []}', b'{"files": {"a": "b"}, "bytes": [1]}', b'{"bytes": {}}'])
def test_manifests_of_another_shape(tmp_path, content):
    (tmp_path / manifest.FILE).write_bytes(content)
    with pytest.raises(QADError, match="integrity.json is not readable"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("content", [*BAD, b'{"pid": 1}', b'{"start_ticks": 5}'])
def test_locks_of_an_unknown_holder(tmp_path, content):
    """Such a lock may belong to a process that is writing it, so it counts until it is stale."""
    (tmp_path / locks.NAME).write_bytes(content)
    assert locks._read(tmp_path / locks.NAME) == {}
    assert locks._describe({}) == "an unknown process"


@pytest.mark.parametrize("content", [*BAD, b'{"files": {"a": {"bytes": Infinity, "sha256": "0"}}, "directory": "b"}'])
def test_event_records(tmp_path, content):
    (tmp_path / "events.json").write_bytes(content)
    with pytest.raises(QADError, match="events.json: not a valid record of event files"):
        _parse(tmp_path / "events.json")


@pytest.mark.parametrize("content", BAD)
def test_config_of_a_checkpoint(tmp_path, content):
    """The file has its right checksum: it was damaged before the import."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes(content)
    manifest.write_manifest(tmp_path / "hf")
    with pytest.raises(
        QADError, match="config.json: (its JSON is nested|not UTF-8|not valid JSON|expected a JSON obj)"
    ):
        read_config(tmp_path)


def test_right_records_are_read(tmp_path):
    json_records.write(tmp_path / JOB_FILE, {"a": [1]})
    assert read_record(tmp_path, JOB_FILE) == {"a": [1]} == json.loads((tmp_path / JOB_FILE).read_text())["content"]
