"""Which files are read, with the same documents from every form, and one error for each file that is not."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import random
import socket
import zipfile

import datasets
import pyarrow
import pytest

from megatron_qad.data import records
from megatron_qad.data.readers import expand_inputs, file_format, read_records
from megatron_qad.data.records import BadLine
from megatron_qad.data.sources import encode_record
from megatron_qad.engine.errors import QADError

ROWS = [{"text": f"document {i} \u00e9"} for i in range(30)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path, requested="auto", split_on=None):
    """The records of an input, as ``prepare_data`` reads them."""
    (path,) = expand_inputs([str(path)])
    found = list(read_records(path, file_format(path, requested), split_on))
    return [record for record in found if not isinstance(record, int)]


def texts(path, requested="auto"):
    return [json.loads(record.data)["text"] for record in read(path, requested)]


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize(
    "content",
    [
        JSONL,
        b"\xef\xbb\xbf" + JSONL,
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
        b"\n\n " + json.dumps(ROWS, indent=1).encode() + b"\r\n",
        "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    ],
    ids=["lines", "mark", "list", "list over lines", "blank before list", "objects over lines"],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_forms_of_json(tmp_path, content, suffix):
    (tmp_path / f"x{suffix}").write_bytes(content)
    assert texts(tmp_path / f"x{suffix}") == [row["text"] for row in ROWS]
    for name, compress in COMPRESS.items():
        (tmp_path / f"x{suffix}.{name}").write_bytes(compress(content))
        assert texts(tmp_path / f"x{suffix}.{name}") == [row["text"] for row in ROWS]


def test_one_object_and_lines_of_a_list(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert texts(tmp_path / "one.json") == [ROWS[0]["text"]]
    (tmp_path / "list.json").write_text(json.dumps(ROWS[:3], indent=2))
    assert [record.line for record in read(tmp_path / "list.json")] == [2, 5, 8]
    (tmp_path / "bad.json").write_text('{"text": "cut off\n{"text": "good"}\n')
    assert len(read(tmp_path / "bad.json")) == 2, "a damaged line of JSONL is one bad line"


def test_elements_longer_than_the_buffer(tmp_path):
    rows = [{"text": "long " * 500_000}, {"text": "short"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert texts(tmp_path / "x.json") == [row["text"] for row in rows]


def test_compression_is_found_by_content(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(gzip.compress(JSONL))
    (tmp_path / "y.jsonl.gz").write_bytes(JSONL)  # a client that decompressed a download and kept its name
    assert texts(tmp_path / "x.jsonl") == texts(tmp_path / "y.jsonl.gz") == [row["text"] for row in ROWS]
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"\ntwo"))
    assert [record.data for record in read(tmp_path / "z.txt.gz", split_on="\n\n")] == [b"one", b"two"]


def test_tables(tmp_path, hf_tokenizer):
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because", "name": "x"}]
    rows = [{"text": None, "messages": chat, "id": 1}, {"text": "plain", "messages": None, "id": 2}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "one [1]*.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    # A description that names a file elsewhere is not followed.
    (tmp_path / "hub" / "README.md").write_text("---\nconfigs:\n- data_files: https://example.invalid/x.parquet\n---\n")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in ("one [1]*.parquet", "saved", "splits", "hub", arrow):
        found = read(tmp_path / path)
        assert [record.line for record in found] == [1, 2]
        decoded = [hf_tokenizer.hf.decode(encode_record(record, hf_tokenizer)[0].ids) for record in found]
        assert "Because" in decoded[0] and decoded[1] == "plain<|im_end|>"


def test_directories_with_several_splits_are_refused(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "saved")
    for name in ("a/train.jsonl", "a/test.jsonl", "b/x/train.jsonl", "b/y/train.jsonl", "c/1.jsonl", "c/2.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JSONL)
    for name, splits in (("saved", "test, train"), ("a", "test, train"), ("b", "x/train, y/train")):
        with pytest.raises(QADError, match=f"{name} has the splits {splits}. Give the files or the directory"):
            expand_inputs([str(tmp_path / name)])
    assert [path.name for path in expand_inputs([str(tmp_path / "c")])] == ["1.jsonl", "2.jsonl.gz"]
    assert texts(tmp_path / "saved" / "train") == [row["text"] for row in ROWS]
    (tmp_path / "empty").mkdir()
    with pytest.raises(QADError, match="empty is a directory without parquet or JSON files"):
        expand_inputs([str(tmp_path / "empty")])


def _flipped(data, position):
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


def _parquet():
    sink = io.BytesIO()
    datasets.Dataset.from_list(ROWS * 50).to_parquet(sink)
    return sink.getvalue()


def _zip():
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a", "b")
    return sink.getvalue()


LONG = random.Random(0).randbytes(3000).hex().encode()
REFUSED = {
    "utf16.txt": ("text".encode("utf-16"), "is UTF-16, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 "),
    "utf16be.jsonl": (b"\xfe\xff" + "{}".encode("utf-16-be"), "is UTF-16"),
    "utf32.txt": ("text".encode("utf-32"), "is UTF-32"),
    "unmarked.txt": ("text".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    "compressed.txt.gz": (gzip.compress("text".encode("utf-16")), "is UTF-16"),
    "x.pkl": (pickle.dumps(ROWS), "is a Python pickle"),
    "x.bin": (bytes(range(100)), "is binary"),
    "x.zip": (_zip(), "is a zip archive"),
    "x.txt": (_zip(), "is a zip archive"),
    "x.idx": (b"MMIDIDX\0\0" + bytes(10), "is the index of prepared data"),
    "x.csv": (b"a,b\n1,2\n", ".csv files are not read"),
    "x.xlsx": (_zip(), ".xlsx files are not read"),
    "cut.txt.gz": (gzip.compress(LONG)[:-1000], "its gzip data is damaged"),
    "cut.txt.zst": (zstd(LONG)[:-1000], "its zstd data is damaged"),
    "cut.txt.bz2": (bz2.compress(LONG)[:-1000], "its bzip2 data is damaged"),
    "cut.txt.xz": (lzma.compress(LONG)[:-1000], "its xz data is damaged"),
    "flipped.txt.gz": (_flipped(gzip.compress(LONG), 2000), "its gzip data is damaged"),
    "empty.txt.gz": (b"", "is empty, expected compressed data"),
    "cut.parquet": (_parquet()[:-50], "the datasets library cannot read it: ArrowInvalid"),
    "flipped.parquet": (_flipped(_parquet(), 60), "the datasets library cannot read it: OSError"),
    "text.parquet": (b"text", "the datasets library cannot read it"),
    "cut.json": (json.dumps(ROWS, indent=1).encode()[:300], r"cut.json:\d+: not JSON"),
    "open.json": (json.dumps(ROWS, indent=1).encode()[:-2], "the file ends inside the list|expected ',' or ']'"),
    "comma.json": (b'[{"text": "a"}\n{"text": "b"}]', "comma.json:2: expected ',' or ']' after an element"),
    "more.json": (json.dumps(ROWS, indent=1).encode() + b"x", "text follows the end of the list"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
    "latin1.json": ('[\n{"text": "\u00e9"}]'.encode("latin-1"), "latin1.json:1: not UTF-8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_one_error(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QADError, match=message) as error:
        read(tmp_path / name)
    assert name in str(error.value)


def test_table_without_documents(tmp_path):
    datasets.Dataset.from_list([{"question": "a"}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(QADError, match=r"none of the columns text, messages, conversations; it has \['question'\]"):
        read(tmp_path / "x.parquet")


def test_inputs_that_are_no_files_or_given_twice(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "x.txt")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path / "dangling", tmp_path / "socket"):
        with pytest.raises(QADError, match=f"--input: {path} is not a file"):
            expand_inputs([str(path)])
    for pair in (("x.txt", "x.txt"), ("x.txt", "link")):
        with pytest.raises(QADError, match="are the same file. Give each file once"):
            expand_inputs([str(tmp_path / name) for name in pair])


def test_records_that_are_too_large_are_bad_lines(tmp_path, monkeypatch):
    import megatron_qad.data.readers as readers

    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 1000)
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * 5000 + b'\n{"text": "b"}\n')
    first, large, last = read(tmp_path / "x.jsonl")
    assert isinstance(large, BadLine) and large.line == 2 and "is larger than" in large.reason
    assert (first.data, last.data, last.line) == (b'{"text": "a"}\n', b'{"text": "b"}\n', 3)
    (tmp_path / "x.txt").write_bytes(b"x" * 5000)
    (large,) = read(tmp_path / "x.txt")
    assert isinstance(large, BadLine) and "--split-on" in large.reason


def test_chats_that_are_too_large_are_bad_lines(hf_tokenizer):
    messages = [{"role": "user", "content": "x" * records.MAX_CHAT_BYTES}, {"role": "assistant", "content": "y"}]
    data = json.dumps({"messages": messages}).encode()
    assert str(encode_record(records.Record("f", 3, True, data), hf_tokenizer)) == (
        f"f:3: the chat has {len(data):,} bytes, more than the 8,388,608 that a chat may have. Split it"
    )
