"""What a job refuses of its data files before anything is built from them."""

import argparse
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared import write_indexed, write_prepared

from megatron_qad.data import checks, file_facts
from megatron_qad.data.data_options import DataOptions
from megatron_qad.data.prepared_files import open_prefix
from megatron_qad.engine.errors import QADError

VOCAB = 500


@pytest.fixture
def check(tmp_path):
    """``check(prefix, ...)``: check the data of a job whose model has ``vocab_size`` ids."""

    def run(*prefixes, vocab_size=VOCAB, checkpoint=None, cache=None):
        names = ("tokenizer_model", "null_tokenizer_eod_id")
        args = argparse.Namespace(**dict.fromkeys(names), tokenizer_type="NullTokenizer", eod_mask_loss=False)
        args.data_cache_path = str(cache or tmp_path / "cache")
        options = DataOptions(calibration_samples=8, vocab_size=vocab_size, checkpoints=(checkpoint,))
        checks.check_data(args, prefixes, options)

    return run


def documents(seed: int, high: int = VOCAB, num: int = 20) -> list[np.ndarray]:
    """Documents of the same lengths for each seed, so that only their content differs."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, high, size=10 + i) for i in range(num)]


@pytest.fixture
def data(tmp_path):
    """Directory with the chats "a" and "b", whose files have equal sizes, and the text "c"."""
    for seed, name in enumerate("ab"):
        masks = [np.arange(len(document)) % 2 for document in documents(seed)]
        masks[0][:3] = (1, 0, 0) if name == "a" else (0, 1, 0)
        write_prepared(tmp_path / name, documents(seed), masks)
    write_prepared(tmp_path / "c", documents(2, num=5))
    return tmp_path


def zero(file: Path, _) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def truncate(file: Path, _) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path, _) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def invert(file: Path, _) -> None:
    file.write_bytes(bytes(1 - value for value in file.read_bytes()))


def remove(file: Path, _) -> None:
    file.unlink()


def replace_by_b(file: Path, name: str) -> None:
    shutil.copyfile(file.with_name(name.replace("a", "b", 1)), file)


def replace_by_c(file: Path, name: str) -> None:
    shutil.copyfile(file.with_name(name.replace("a", "c", 1)), file)


NOT_DESCRIBED = "is not the file that .*/a.json describes"
DAMAGES = [
    ("a.bin", zero, f"a.bin {NOT_DESCRIBED}"),
    ("a.bin", flip, f"a.bin {NOT_DESCRIBED}: its SHA-256 is [0-9a-f]{{12}}, not [0-9a-f]{{12}}"),
    ("a.bin", replace_by_b, f"a.bin {NOT_DESCRIBED}"),
    ("a.bin", replace_by_c, r"a.bin has \d+ bytes, but its index of 20 documents implies \d+"),
    ("a.bin", truncate, r"a.bin has \d+ bytes, but its index"),
    ("a.bin", remove, "a.bin not found"),
    ("a.idx", zero, "a.idx cannot be read"),
    ("a.idx", flip, "a.idx is damaged: its documents do not follow each other"),
    ("a.idx", truncate, "a.idx cannot be read"),
    ("a.idx", replace_by_c, "a.bin has .* but its index of 5 documents"),
    ("a.idx", remove, "a.idx not found"),
    ("a_loss_mask.bin", zero, f"a_loss_mask.bin {NOT_DESCRIBED}"),
    ("a_loss_mask.bin", invert, f"a_loss_mask.bin {NOT_DESCRIBED}"),
    ("a_loss_mask.bin", replace_by_b, f"a_loss_mask.bin {NOT_DESCRIBED}"),
    ("a_loss_mask.bin", truncate, r"a_loss_mask.bin has \d+ bytes, but its index"),
    ("a_loss_mask.bin", remove, "a_loss_mask.idx exists, but .*a_loss_mask.bin does not"),
    ("a_loss_mask.idx", remove, "a_loss_mask.bin exists, but .*a_loss_mask.idx does not"),
    ("a_loss_mask.idx", zero, "a_loss_mask.idx cannot be read"),
    ("a_loss_mask.idx", truncate, "a_loss_mask.idx cannot be read"),
    ("a_loss_mask.idx", flip, "a_loss_mask.idx is damaged"),
    ("a.json", replace_by_b, f"a.bin {NOT_DESCRIBED}"),
    ("a.json", replace_by_c, r"a.json describes 5 documents with 60 tokens, but .*a.idx has 20 with \d+"),
    ("a.json", remove, "a.json is missing. megatron-qad prepare wrote it with the loss mask"),
    ("a.json", truncate, "a.json: not valid JSON"),
    ("a.json", zero, "a.json: not valid JSON"),
]


@pytest.mark.parametrize("name, damage, message", DAMAGES, ids=[f"{n}-{d.__name__}" for n, d, _ in DAMAGES])
def test_damaged_or_exchanged_file_is_refused_by_name(check, data, name, damage, message):
    check(f"{data}/a", f"{data}/b", f"{data}/c")
    damage(data / name, name)
    with pytest.raises(QADError, match=message):
        check(f"{data}/c", f"{data}/a")


def test_exchanged_pairs_of_files_are_refused(check, data):
    for suffix in ("bin", "idx"):
        (data / f"a_loss_mask.{suffix}").rename(data / f"moved.{suffix}")
    with pytest.raises(QADError, match="a.json records a loss mask, but .*a_loss_mask.bin and .idx are missing"):
        check(f"{data}/a")
    for suffix in ("bin", "idx"):
        (data / f"moved.{suffix}").rename(data / f"c_loss_mask.{suffix}")
    with pytest.raises(QADError, match="c.json records that every token counts, but .*c_loss_mask.bin and .idx exist"):
        check(f"{data}/c")
    for suffix in ("bin", "idx"):  # tokens and mask of one prefix
        shutil.copyfile(data / f"c_loss_mask.{suffix}", data / f"b.{suffix}")
    with pytest.raises(QADError, match="b.bin is not the file that .*b.json describes"):
        check(f"{data}/b")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sha256": None}, "has the value None of 'sha256', so it is damaged"),
        ({"sha256": {"bin": 5}}, "has the value {'bin': 5} of 'sha256'"),
        ({"sha256": {"bin": "0"}}, "has no SHA-256 of .*a.idx"),
        ({"sha256": {"bin": "", "idx": "", "loss_mask.bin": "", "/../x": ""}}, "has a SHA-256 of '/../x', which"),
        ({"tokens": "many"}, "has the value 'many' of 'tokens'"),
        ({"unknown": 1}, "has the value 1 of 'unknown'"),
        ({"format_version": 2}, "has format version 2, expected format version 1"),
        ({"format_version": None}, "is not metadata of megatron-qad prepare"),
        ({"eod": ...}, "has no value of 'eod'"),
    ],
)
def test_changed_metadata_is_refused(check, data, change, message):
    file = data / "a.json"
    content = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    with pytest.raises(QADError, match=f"a.json {message}"):
        check(f"{data}/a")


def test_other_data_under_the_name_of_the_metadata(check, data):
    """Such as the text from which Megatron's tool made data with the same prefix."""
    (data / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(QADError, match=r"a.json: not valid JSON .*If the file is something else, rename it"):
        check(f"{data}/a")


def test_ids_that_the_model_does_not_have_are_refused(check, tmp_path):
    """VOCAB is padded to 512 rows of the embedding, in which 510 would be trained on without an error."""
    for name, write in (("ours", write_prepared), ("foreign", lambda *a: write_indexed(*a, np.uint16))):
        ids = [*documents(0), np.array([3, VOCAB - 1, 5])]
        check(write(f"{tmp_path}/{name}", ids))
        ids[-1][1] = 510
        write(f"{tmp_path}/{name}", ids)
        with pytest.raises(QADError, match=f"{name}.bin has the token id 510, but the model has the ids 0 to 499 "):
            check(f"{tmp_path}/{name}")
        check(f"{tmp_path}/{name}", vocab_size=511)


def test_ids_that_no_model_has_are_refused(check, tmp_path):
    prefix = write_indexed(f"{tmp_path}/negative", [*documents(0), np.array([1, -1])], np.int32)
    with pytest.raises(QADError, match="negative.bin has the token id -1; ids are 0 or more"):
        check(prefix)
    prefix = write_indexed(f"{tmp_path}/zeros", [np.zeros(9)] * 3, np.int64)
    with pytest.raises(QADError, match="all 27 tokens of .*zeros.bin have the id 0, so it is damaged"):
        check(prefix)
    prefix = write_indexed(f"{tmp_path}/floats", documents(0), np.float32)
    with pytest.raises(QADError, match="floats.idx declares float32. Expected integers"):
        check(prefix)
    prefix = write_indexed(f"{tmp_path}/wrapped", documents(0), np.uint16)
    check(prefix, vocab_size=1 << 16)
    with pytest.raises(QADError, match="wrapped.idx stores ids as uint16, up to 65535, but the vocabulary has 128256"):
        check(prefix, vocab_size=128256)
    small = write_prepared(f"{tmp_path}/small", documents(0))  # its tokenizer has 500 ids
    check(small, vocab_size=128256)


def test_unreadable_tokenizer_does_not_stop_data_of_other_tools(check, tmp_path, capsys):
    (tmp_path / "checkpoint" / "hf").mkdir(parents=True)
    (tmp_path / "checkpoint" / "hf" / "tokenizer.json").write_text("{")
    check(write_indexed(f"{tmp_path}/x", documents(0), np.uint16), checkpoint=str(tmp_path / "checkpoint"))
    assert "/x: not compared with the model's tokenizer in " in capsys.readouterr().out


def test_data_of_other_tools_is_compared_with_the_tokenizer(check, tmp_path, hf_dir, hf_tokenizer, capsys):
    shutil.copytree(hf_dir, tmp_path / "checkpoint" / "hf")
    checkpoint, eod = str(tmp_path / "checkpoint"), hf_tokenizer.eod
    ended = [np.append(document, eod) for document in documents(0)]
    check(write_indexed(f"{tmp_path}/ended", ended, np.uint16), checkpoint=checkpoint)
    assert "ended.json does not exist: the data is of another tool" in (out := capsys.readouterr().out)
    assert "WARNING" not in out
    unended = [document[document != eod] for document in documents(0)]
    check(write_indexed(f"{tmp_path}/unended", unended, np.uint16), checkpoint=checkpoint)
    assert f"none of its first 20 documents ends with the EOD {eod}" in capsys.readouterr().out
    ended[5][0] = 509
    write_indexed(f"{tmp_path}/ended", ended, np.uint16)
    with pytest.raises(QADError, match="has the token id 509, but the model's tokenizer in .* has the ids 0 to 499"):
        check(f"{tmp_path}/ended", checkpoint=checkpoint, vocab_size=512)


@pytest.mark.parametrize(
    "made, given, meant",
    [
        ("chats", "chats.bin", "chats"),
        ("chats", "chats_loss_mask", "chats"),
        ("chats", "chat", "chats"),
        ("chats.bin", "chats", "chats.bin"),
        ("text_text_document", "text", "text_text_document"),
        ("chats/train", "chats", "chats/train"),
        ("chats", "other", None),
    ],
)
def test_missing_data_names_data_of_a_similar_name(check, tmp_path, monkeypatch, made, given, meant):
    (tmp_path / made).parent.mkdir(exist_ok=True)
    write_indexed(f"{tmp_path}/{made}", documents(0), np.uint16)
    with pytest.raises(QADError) as error:
        check(f"{tmp_path}/{given}")
    assert (f"(did you mean {tmp_path}/{meant}?)" in str(error.value)) == (meant is not None), error.value
    assert f"{given}.bin and {tmp_path}/{given}.idx not found" in str(error.value)


def read(data, name, cache, **more) -> list[str]:
    reading = checks.read_contents([open_prefix(f"{data}/{name}")], cache and str(cache), **more)
    return [Path(file).name for file in reading.read]


def test_files_are_read_again_only_if_they_have_changed(data, tmp_path, capsys):
    names = ["a.bin", "a.idx", "a_loss_mask.bin"]
    assert read(data, "a", tmp_path / "cache") == names
    assert read(data, "a", tmp_path / "cache") == []
    file = data / "a.bin"
    times = os.stat(file)
    flip(file, None)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync -a does
    assert read(data, "a", tmp_path / "cache") == ["a.bin"]
    (record,) = (tmp_path / "cache").iterdir()
    flip(record, None)
    assert read(data, "a", tmp_path / "cache") == names
    assert read(data, "b", tmp_path / "cache") == [name.replace("a", "b", 1) for name in names]
    assert read(data, "a", tmp_path / "cache") == []
    assert capsys.readouterr().out == ""
    for _ in range(2):
        assert read(data, "a", file) == names  # a file, where a directory is expected
        assert "cannot be written (" in capsys.readouterr().out
    assert read(data, "a", None) == names and (data / "a" / "cache").is_dir()


def test_extremes_of_a_file_of_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(file_facts, "_BLOCK", 64)
    values = np.arange(1000, dtype=np.int32)
    values[777] = -5
    values.tofile(tmp_path / "values")
    facts = file_facts.facts_of(str(tmp_path / "values"), "int32")
    assert (facts.smallest, facts.largest, facts.stamp[0]) == (-5, 999, 4000)


def test_files_above_the_limit_are_named(data, tmp_path, capsys):
    found = [open_prefix(f"{data}/{name}") for name in "ac"]
    limit = sum((data / name).stat().st_size for name in ("c.bin", "c.idx", "a_loss_mask.bin"))
    reading = checks.read_contents(found, str(tmp_path / "cache"), max_bytes=limit)
    assert [Path(file).name for file in reading.skipped] == ["a.idx", "a.bin"]
    checks._log(found, reading)
    assert "a.bin. Run megatron-qad verify once" in capsys.readouterr().out
    assert checks.read_contents(found, str(tmp_path / "cache"), max_bytes=None).skipped == []
    assert checks.read_contents(found, str(tmp_path / "cache"), max_bytes=0).skipped == []


def test_tool_reads_data_before_the_job(data, tmp_path, monkeypatch, capsys):
    tool = Path(__file__).resolve().parents[3] / "tools" / "verify_data.py"

    def run(*arguments) -> str | None:
        """Return the error with which the tool ends, or None."""
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, arguments)])
        try:
            runpy.run_path(str(tool), run_name="__main__")
        except SystemExit as ended:
            return ended.code

    cache = tmp_path / "cache"
    assert run(data / "a", data / "c", "--data-cache-path", cache) is None
    out = capsys.readouterr().out
    assert "/c: 60 tokens, largest id " in out and "SHA-256 as recorded" in out and "read 5 files" in out
    assert checks.read_contents([open_prefix(f"{data}/a")], str(cache), max_bytes=0).skipped == []
    assert "/a.bin has the token id" in run(data / "a", "--vocab-size", 100, "--data-cache-path", cache)
    zero(data / "a.bin", None)
    assert "/a.bin is not the file that" in run(data / "a", "--data-cache-path", cache)
    assert "nothing.bin and" in run(data / "nothing")
