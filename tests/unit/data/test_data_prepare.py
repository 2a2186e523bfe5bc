"""Data preparation: round trips, lists of bad lines, complete or absent outputs."""

import json
import resource
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_qad.data.metadata import load_metadata, loss_mask_prefix, output_files
from megatron_qad.data.prepare import PrepareOptions, prepare_data
from megatron_qad.data.readers import BLANK_LINES, read_records
from megatron_qad.data.records import BadLine, Record
from megatron_qad.data.sources import encode_record
from megatron_qad.data.tokenizer import load_tokenizer
from megatron_qad.engine.errors import QADError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_data.py"


def documents(prefix):
    return [doc.tolist() for doc in IndexedDataset(prefix)]


def test_text_files_round_trip_through_sentencepiece(tmp_path, corpus, sp_model, prepared):
    files = []
    for i, text in enumerate(corpus[:3]):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
        files.append(str(tmp_path / f"{i}.txt"))
    prefix, metadata = prepared(files, sp_model)
    tokenizer = load_tokenizer(sp_model)
    encoded = documents(prefix)
    assert [tokenizer.sp.decode(ids[:-1]) for ids in encoded] == corpus[:3]
    assert {ids[-1] for ids in encoded} == {tokenizer.eod}
    assert metadata == load_metadata(prefix)
    assert (metadata.documents, metadata.tokens) == (3, sum(map(len, encoded)))
    assert metadata.supervised_tokens == metadata.tokens and not metadata.loss_mask
    assert not IndexedDataset.exists(loss_mask_prefix(prefix)), "a mask of all ones is not written"
    assert IndexedDataset(prefix).index.dtype == np.uint16, "400 ids fit into 16 bits"
    assert metadata.vocab_size == 400 and metadata.tokenizer_files_sha256.keys() == {"tiny.model"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40).filter(str.strip), min_size=1, max_size=5))
def test_any_unicode_text_round_trips(tmp_path_factory, hf_dir, hf_tokenizer, texts):
    texts = [t.replace("<|", "<") for t in texts]
    directory = tmp_path_factory.mktemp("any")
    (directory / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    prefix = str(directory / "out")
    prepare_data(PrepareOptions(inputs=[str(directory / "in.jsonl")], tokenizer=str(hf_dir), output=prefix))
    decoded = [hf_tokenizer.hf.decode(ids[:-1], clean_up_tokenization_spaces=False) for ids in documents(prefix)]
    assert decoded == texts


def test_file_with_chats_and_texts(write_jsonl, prepared, hf_dir, hf_tokenizer):
    chat = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "the answer"}]
    path = write_jsonl([{"messages": chat}, {"text": "plain"}, {"messages": chat, "id": 7}])
    prefix, metadata = prepared(path, hf_dir)
    tokens, mask = documents(prefix), documents(loss_mask_prefix(prefix))
    assert [len(t) for t in tokens] == [len(m) for m in mask]
    counted = [[i for i, m in zip(*pair, strict=True) if m] for pair in zip(tokens, mask, strict=True)]
    assert [hf_tokenizer.hf.decode(ids) for ids in counted] == [
        "the answer<|im_end|>",
        "plain<|im_end|>",
        "the answer<|im_end|>",
    ]
    assert all(ids[-1] == hf_tokenizer.eod for ids in tokens)
    assert mask[0][-1] == 0, "the turn has an end of its own; the EOD after the template's newline does not count"
    assert metadata.loss_mask and metadata.chat_documents == 2
    assert metadata.supervised_tokens == sum(map(sum, mask))


def test_eod_counts_if_the_template_does_not_end_the_answer(make_hf_dir):
    tokenizer = load_tokenizer(make_hf_dir("{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"))
    line = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    [encoded] = encode_record(Record("f", 1, True, json.dumps(line).encode()), tokenizer)
    assert encoded.ids[-1] == tokenizer.eod and encoded.mask[-1] == 1


BAD = [
    ('{"text": "cut off', "not JSON"),
    ("[1, 2]", "expected a JSON object"),
    ('{"content": "x"}', "has no 'text', 'messages' or 'input_ids'; its keys that are not null are ['content']"),
    ('{"text": 3}', "'text' is int"),
    ('{"input_ids": []}', "'input_ids' is not a non-empty list"),
    ('{"input_ids": [1, 2.0]}', "'input_ids' is not a non-empty list"),
    ('{"input_ids": [1, -1]}', "'input_ids' is not a non-empty list"),
    ('{"input_ids": [1, 99999]}', "'input_ids' has the id 99999, but the tokenizer has"),
    ('{"input_ids": [1, 2], "loss_mask": [1]}', "'loss_mask' is not a list of 2 zeros and ones"),
    ('{"input_ids": [1, 2], "loss_mask": [0, 0]}', "'loss_mask' is 0 everywhere"),
    ('{"text": "a", "input_ids": [1]}', "has both 'text' and 'input_ids'"),
    ('{"text": null}', "has no 'text', 'messages' or 'input_ids'"),
    ('{"text": "a"' + ', "b": ' + "[" * 100000 + "]" * 100000 + "}", "not JSON"),
    ('{"text": "  "}', "the text is empty"),
    ('{"text": "a", "messages": []}', "has both"),
    ('{"messages": []}', "'messages' is not"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no message has the role 'assistant'"),
    ('{"text": "\\ud800"}', "lone surrogate"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "lone surrogate"),
]


@pytest.mark.parametrize("chat", [True, False])
def test_end_of_truncated_text_does_not_count(chat, hf_tokenizer):
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it"}]
    line = {"messages": turns} if chat else {"text": "Because it"}
    [complete], [truncated] = (
        encode_record(Record("f", 1, True, json.dumps(line | finish).encode()), hf_tokenizer)
        for finish in ({"finish": "eos"}, {"finish": "length"})
    )
    assert truncated.ids == complete.ids
    counts = complete.mask or [1] * len(complete.ids)
    (end,) = (i for i, (a, b) in enumerate(zip(counts, truncated.mask, strict=True)) if a != b)
    assert (counts[end], truncated.mask[end], complete.ids[end]) == (1, 0, hf_tokenizer.eod)
    assert hf_tokenizer.hf.decode([i for i, m in zip(truncated.ids, truncated.mask, strict=True) if m]) == "Because it"


def test_truncated_texts_are_not_chats(write_jsonl, prepared, hf_dir):
    """Their last token does not count, so they have a mask as chats do."""
    _, metadata = prepared(write_jsonl([{"text": "Because it", "finish": "length"}]), hf_dir)
    assert (metadata.documents, metadata.chats, metadata.chat_documents) == (1, 0, 0)
    assert metadata.loss_mask and metadata.supervised_tokens == metadata.tokens - 1


def test_chats_of_several_documents(write_jsonl, prepared, make_hf_dir):
    """The template removes earlier answers. The end of the last turn alone is truncated."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else '...' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    path = write_jsonl([{"messages": turns * 3, "finish": "length"}, "bad", {"text": "plain"}, {"messages": turns}])
    tokenizer = make_hf_dir(template)
    prefix, metadata = prepared(path, tokenizer, max_bad_fraction=0.25)
    assert (metadata.documents, metadata.chats, metadata.chat_documents, metadata.bad_lines) == (5, 2, 4, 1)
    end = load_tokenizer(tokenizer).eod
    tokens, masks = documents(prefix), documents(loss_mask_prefix(prefix))
    counted_ends = [sum(m for t, m in zip(*pair, strict=True) if t == end) for pair in zip(tokens, masks, strict=True)]
    assert counted_ends == [1, 1, 0, 1, 1]
    with pytest.raises(QADError, match="1 of 4 records is bad"):  # records of the input, not documents
        prepared(path, tokenizer, name="strict", max_bad_fraction=0.2)
    _, last = prepared(path, tokenizer, name="last", max_bad_fraction=0.25, multi_turn="last")
    assert (last.documents, last.chats, last.chat_documents) == (3, 2, 2)


def test_bad_lines_are_listed_with_reasons(write_jsonl, prepared, hf_dir):
    lines = [{"text": "good one"}, *[line for line, _ in BAD], "", {"text": "good two"}]
    path = write_jsonl(lines)
    prefix, metadata = prepared(path, hf_dir, max_bad_fraction=0.95)
    listed = Path(f"{prefix}.bad.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == len(BAD)
    for line_number, (entry, (_, reason)) in enumerate(zip(listed, BAD, strict=True), start=2):
        assert entry.startswith(f"{path}:{line_number}: ") and reason in entry
    assert (metadata.documents, metadata.bad_lines, metadata.blank_lines) == (2, len(BAD), 1)


def test_too_many_bad_lines_write_only_their_list(tmp_path, write_jsonl, prepared, hf_dir):
    path = write_jsonl([{"text": "good"}, "broken"])
    with pytest.raises(QADError, match=r"1 of 2 records is bad.*input.jsonl:2: not JSON"):
        prepared(path, hf_dir)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input.jsonl", "out.bad.txt"]


def test_invalid_utf8_is_reported_with_its_line(tmp_path, sp_model):
    (tmp_path / "x.txt").write_bytes(b"one\ntwo\nthr\xff\n")
    (record,) = read_records(tmp_path / "x.txt", "text", None)
    bad = encode_record(record, load_tokenizer(sp_model))
    assert isinstance(bad, BadLine) and bad.line == 3 and "0xff" in bad.reason


def test_splitting_keeps_line_numbers(tmp_path):
    (tmp_path / "x.txt").write_text("a\nb\n\n \n  c\n---\nd\n", encoding="utf-8")
    blank = list(read_records(tmp_path / "x.txt", "text", BLANK_LINES))
    assert [(r.line, r.data) for r in blank] == [(1, b"a\nb"), (5, b"  c\n---\nd\n")]
    dashes = list(read_records(tmp_path / "x.txt", "text", r"^-+\n"))
    assert [(r.line, r.data) for r in dashes] == [(1, b"a\nb\n\n \n  c\n"), (7, b"d\n")]
    with pytest.raises(QADError, match="matches the empty string"):
        list(read_records(tmp_path / "x.txt", "text", "z*"))


def test_several_workers_keep_the_order(write_jsonl, prepared, sp_model):
    lines = [{"text": f"document {i} " * (i % 7 + 1)} if i % 50 else "bad" for i in range(400)]
    path = write_jsonl(lines)
    options = {"max_bad_fraction": 0.1, "validation_fraction": 0.3}
    one, metadata_one = prepared(path, sp_model, name="one", **options)
    two, metadata_two = prepared(path, sp_model, name="two", workers=2, **options)
    assert metadata_one == metadata_two
    for suffix in (".bin", ".idx", ".bad.txt", "_valid.bin", "_valid.idx", "_valid.json"):
        assert Path(one + suffix).read_bytes() == Path(two + suffix).read_bytes()


def test_existing_output_is_replaced_only_with_force(write_jsonl, prepared, hf_dir):
    chat = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]}
    prefix, _ = prepared(write_jsonl([chat]), hf_dir)
    before = {p: p.read_bytes() for p in output_files(prefix) if p.exists()}
    text = write_jsonl([{"text": "plain"}])
    with pytest.raises(QADError, match=r"out\.bin.*exists.*--force"):
        prepared(text, hf_dir)
    with pytest.raises(QADError, match="1 of 1 record is bad"):
        prepared(write_jsonl(["broken"], "broken.jsonl"), hf_dir, force=True)
    assert {p: p.read_bytes() for p in output_files(prefix) if p.exists()} == before, (
        "a failed replacement must not change the output"
    )
    prepared(text, hf_dir, force=True)
    assert not IndexedDataset.exists(loss_mask_prefix(prefix)), "the old mask must be removed"


def test_full_disk_leaves_no_output(tmp_path, write_jsonl, prepared, sp_model):
    path = write_jsonl(
        [{"text": "some text " * 50}] * 2000
    )  # larger than the file size limit below and than the buffers
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(QADError, match="Preparing .*out failed: .*File too large"):
            prepared(path, sp_model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["input.jsonl"]


def test_prepend_bos_adds_one_bos(write_jsonl, prepared, sp_model):
    prefix, _ = prepared(write_jsonl([{"text": "a"}]), sp_model, prepend_bos=True)
    tokenizer = load_tokenizer(sp_model)
    assert documents(prefix)[0] == [tokenizer.bos, *tokenizer.encode("a"), tokenizer.eod]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ["nowhere.jsonl"]}, "nowhere.jsonl does not exist"),
        ({"tokenizer": "org/name"}, "names on the Hub are not downloaded"),
        ({"split_on": "("}, "--split-on '\\(' is not a regular expression"),
        ({"workers": 0}, "--workers 0"),
        ({"multi_turn": "all"}, "--multi-turn 'all': expected one of each, last"),
        ({"max_bad_fraction": 2}, "--max-bad-fraction 2"),
        ({"json_key": "messages"}, "has no chat template"),
    ],
)
def test_invalid_options_are_errors(tmp_path, write_jsonl, sp_model, change, message):
    path = write_jsonl([{"messages": [{"role": "assistant", "content": "x"}]}])
    options = {"inputs": [path], "tokenizer": str(sp_model), "output": str(tmp_path / "out"), **change}
    with pytest.raises(QADError, match=message):
        prepare_data(PrepareOptions(**options))


def test_an_empty_input_is_an_error(write_jsonl, prepared, sp_model):
    with pytest.raises(QADError, match="has no document"):
        prepared(write_jsonl(["", " "]), sp_model)


def run_tool(monkeypatch, *arguments):
    """Run the tool and return the error that ends it, or None."""
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as exit_:
        return exit_.code


def test_the_command_line(tmp_path, write_jsonl, sp_model, monkeypatch, capsys):
    common = ["--tokenizer", str(sp_model), "--output", str(tmp_path / "out")]
    assert "input.jsonl:2" in run_tool(monkeypatch, "--input", write_jsonl([{"text": "a"}, "bad"]), *common)
    assert run_tool(monkeypatch, "--input", write_jsonl([{"text": "a"}]), *common) is None
    assert "out: 1 document, 2 tokens, 2 of them in the loss, 0 unknown" in capsys.readouterr().out


def test_data_without_counted_tokens_is_an_error(prepared, write_jsonl, hf_dir, tmp_path):
    """Every answer is truncated before its first word."""
    messages = [{"role": "user", "content": "Who answers?"}, {"role": "assistant", "content": "<|im_end|>"}]
    questions = write_jsonl([{"messages": messages, "finish": "length"}] * 3)
    with pytest.raises(QADError, match=r"no token of its 3 documents would count in the loss"):
        prepared(questions, hf_dir)
    assert not list(tmp_path.glob("out*"))
