"""Index and headers of an exported directory that are damaged on purpose: issues, never an exception."""

import struct

import pytest
import torch
from safetensors.torch import save_file

from megatron_qad.checkpoint.hf_directory import INDEX_NAME, read_json, read_shards
from megatron_qad.checkpoint.hf_reader import HFReader
from megatron_qad.engine import QADError

DEEP = b'{"a":' * 300 + b"1" + b"}" * 300
BAD = [b"[" * 100_000, DEEP, b"\xff\xfe", b"{", b"", b"[]", b"7"]


def issues_of(read, *args) -> list[str]:
    issues: list[str] = []
    read(*args, lambda name, problem: issues.append(f"{name}: {problem}"))
    return issues


@pytest.mark.parametrize("content", [*BAD, b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"{}"])
def test_damaged_index(tmp_path, content):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    (tmp_path / INDEX_NAME).write_bytes(content)
    assert any(issue.startswith(f"{INDEX_NAME}: ") for issue in issues_of(read_shards, tmp_path))


@pytest.mark.parametrize("total", [8, "8", [8], {"a": 1}, None])
def test_total_size_of_the_index(tmp_path, total):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    content = '{"metadata": {"total_size": %s}, "weight_map": {"a": "model-1.safetensors"}}'
    (tmp_path / INDEX_NAME).write_text(content % repr(total).replace("'", '"').replace("None", "null"))
    assert bool(issues_of(read_shards, tmp_path)) == (total not in (8, None))


@pytest.mark.parametrize(
    "header",
    [
        *BAD[:-1],
        b'{"a": [1]}',
        b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, NaN]}}',
        b'{"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": ["F32"], "shape": [[2]], "data_offsets": [0, 8]}}',
    ],
)
def test_damaged_header(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert any(issue.startswith("model.safetensors: ") for issue in issues_of(read_shards, tmp_path))


def test_header_that_no_loader_reads(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)  # a sparse file
    assert "model.safetensors: has a header of 200000000 bytes" in issues_of(read_shards, tmp_path)[0]


@pytest.mark.parametrize("content", BAD)
def test_damaged_json(tmp_path, content):
    (tmp_path / "hf_quant_config.json").write_bytes(content)
    (issue,) = issues_of(read_json, tmp_path / "hf_quant_config.json")
    assert issue.startswith("hf_quant_config.json: ") and str(tmp_path) not in issue


@pytest.mark.parametrize("content", BAD)
@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
def test_import_of_damaged_json(tmp_path, name, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QADError, match=f"{name}: "):
        HFReader(tmp_path)
