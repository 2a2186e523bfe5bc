"""``--validation-fraction``: which side a document is on, two complete outputs or none; outputs that are refused."""

import errno
import json
import os
import random
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_qad.data.metadata import data_file, load_metadata, output_files, valid_prefix
from megatron_qad.data.prepare import PrepareOptions, prepare_data
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import manifest

LINES = [{"text": f"document {i}"} for i in range(300)]


def documents(prefix):
    return {tuple(ids.tolist()) for ids in IndexedDataset(prefix)}


def test_sides_depend_on_the_document_only(prepared, write_jsonl, hf_dir):
    prefix, metadata = prepared(write_jsonl(LINES), hf_dir, name="a", validation_fraction=0.2)
    train, held_out = documents(prefix), documents(valid_prefix(prefix))
    assert len(train) + len(held_out) == 300 and not train & held_out
    # 60 expected with a standard deviation of 7; the hash has no seed, so the number never changes.
    assert 40 < len(held_out) < 80 and metadata.documents == len(train)
    assert load_metadata(valid_prefix(prefix)).documents == len(held_out)
    shuffled = random.Random(1).sample(LINES * 2, 600) + [{"text": "another", "id": 1}]
    again, _ = prepared(write_jsonl(shuffled, "s.jsonl"), hf_dir, name="b", validation_fraction=0.2)
    assert documents(valid_prefix(again)) - held_out <= documents(again) ^ documents(valid_prefix(again))
    assert held_out <= documents(valid_prefix(again)) and train <= documents(again)
    assert not documents(again) & documents(valid_prefix(again)), "equal documents are on the same side"
    more, _ = prepared(write_jsonl(LINES), hf_dir, name="c", validation_fraction=0.3)
    assert held_out < documents(valid_prefix(more)), "a larger fraction holds out those of a smaller one"


def test_documents_of_one_chat_are_on_the_same_side(prepared, write_jsonl, make_hf_dir):
    """The template removes the thoughts of earlier turns, so that each turn is a document of its own."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last and m.reasoning %}"
        "<think>{{ m.reasoning }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_hf_dir(template)

    def turn(i, j):
        answer = {"role": "assistant", "content": f"answer {j}", "reasoning": "hm"}
        return [{"role": "user", "content": f"chat {i} question {j}"}, answer]

    chats = [{"messages": [*turn(i, 1), *turn(i, 2)]} for i in range(60)]
    prefix, metadata = prepared(write_jsonl(chats), tokenizer, validation_fraction=0.3)
    held_out = load_metadata(valid_prefix(prefix))
    assert metadata.chat_documents == 2 * metadata.chats and held_out.chat_documents == 2 * held_out.chats
    assert metadata.chats + held_out.chats == 60


def test_both_sides_or_neither(prepared, write_jsonl, hf_dir, tmp_path):
    path = write_jsonl([{"text": "the only one"}] * 5, "equal.jsonl")
    message = r"--validation-fraction 0.5: the data for .* has no document .* another fraction"
    with pytest.raises(QADError, match=message):
        prepared(path, hf_dir, validation_fraction=0.5)
    assert not list(tmp_path.glob("out*"))
    prefix, _ = prepared(write_jsonl(LINES), hf_dir, validation_fraction=0.2)
    files = [file for p in (prefix, valid_prefix(prefix)) for file in output_files(p) if file.exists()]
    before = {file: file.read_bytes() for file in files}
    assert len(before) == 6
    with pytest.raises(QADError, match="already exists"):
        prepared(path, hf_dir, validation_fraction=0.2)
    with pytest.raises(QADError, match="out_valid was held out of it, but without --validation-fraction"):
        prepared(path, hf_dir, force=True)
    with pytest.raises(QADError, match="has no document"):
        prepared(path, hf_dir, validation_fraction=0.2, force=True)
    assert all(file.read_bytes() == content for file, content in before.items())


def test_failed_rename_leaves_neither_side(prepared, write_jsonl, hf_dir, tmp_path, monkeypatch):
    rename = os.replace

    def fails(source, target):
        if str(target).endswith("out_valid.json"):  # the last one
            raise OSError(errno.EDQUOT, "Disk quota exceeded", str(target))
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(QADError, match="Preparing .*out failed: .*Disk quota exceeded"):
        prepared(write_jsonl(LINES), hf_dir, validation_fraction=0.2)
    assert [file.name for file in tmp_path.iterdir()] == ["input.jsonl"]


def test_sums_of_every_file(prepared, write_jsonl, hf_dir):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [{"messages": [{"role": "user", "content": f"q{i}"}, *chat[1:]]} for i in range(100)]
    prefix, _ = prepared(write_jsonl(lines), hf_dir, validation_fraction=0.3)
    for p in (prefix, valid_prefix(prefix)):
        sums = load_metadata(p).sha256
        files = [str(file) for file in output_files(p)[:-1] if "_image" not in file.name]  # no record has images
        assert sorted(data_file(p, suffix) for suffix in sums) == sorted(files)
        for suffix, digest in sums.items():
            assert manifest.sum_of(Path(data_file(p, suffix)))[1] == digest


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan"), float("inf")])
def test_fractions_that_are_refused(prepared, write_jsonl, hf_dir, fraction):
    with pytest.raises(QADError, match="--validation-fraction .*: expected a number above 0 and below 1"):
        prepared(write_jsonl(LINES), hf_dir, validation_fraction=fraction)


def test_outputs_that_are_refused(tmp_path, hf_dir):
    """Nothing is written, and no input is removed."""
    for name in ("data.json", "data.bad.txt", "data_valid.json"):
        (tmp_path / name).write_text(json.dumps({"text": "input"}))
    (tmp_path / "other.bin").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data.json")
    before = sorted(tmp_path.iterdir())

    def refused(message, output, *inputs, **options):
        files = [str(tmp_path / name) for name in inputs]
        with pytest.raises(QADError, match=message):
            prepare_data(PrepareOptions(files, str(hf_dir), str(output), force=True, **options))
        assert sorted(tmp_path.iterdir()) == before

    for name in ("data.json", "data.bad.txt", "link.jsonl"):
        refused("would overwrite the input", tmp_path / "data", name)
    refused("would overwrite the input", tmp_path / "data", "data_valid.json", validation_fraction=0.5)
    refused(r"other.bin is a directory", tmp_path / "other", "data.json")
    refused("is a directory. Give a prefix", f"{tmp_path}/", "data.json")
    refused("out: cannot be written", tmp_path / "data.json" / "out", "data.json")
    refused("cannot be written", "/proc/1/out", "data.json")
