"""Generated answers that are kept because they are correct."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_qad.data.answer_filter import filter_answers, is_same_number, load_check
from megatron_qad.engine.errors import QADError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "filter_data.py"


def record(content, answer="42", prompt="6 * 7?", **fields):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": content}]
    return {"answer": answer, "messages": turns, **fields}


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "answer", "is_correct"),
    [
        ("It is 42.", "42", True),
        ("6 * 7 = 41", 42, False),
        ("no number", "42", False),
        (r"The answer is $\boxed{42}$, not 43.", "42", True),
        (r"\boxed{41}, then \boxed{\frac{84}{2}}", "42", True),
        ("<think>42?</think> No: 40.", "42", False),
        ("about 1,234.50 dollars", "1234.5", True),
        ("-2e3", -2000, True),
        ("3/4", "0.75", True),
        ("1/0", "1", False),  # not a number; its parts are not numbers of their own
        ("5 apples and 42", "she has 40 + 2 = 42 apples #### 42", True),
        ("0.1", 0.1, True),
        ("the years 2024 and 1,000,000", "1000000", True),
    ],
)
def test_numeric_check(content, answer, is_correct):
    assert is_same_number(record(content, answer)) is is_correct


def test_correct_answers_are_copied_unchanged(tmp_path, capsys, monkeypatch):
    records = [
        record("42", note="é\u2028"),
        record("41"),
        record("42", finish="length"),
        record("7", "7", prompt="7?"),
        record("1", prompt="unsolved?"),
    ]
    source = write(tmp_path / "answers.jsonl", records)
    arguments = ["--input", str(source), "--check", "numeric", "--output", str(tmp_path / "correct.jsonl")]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    runpy.run_path(str(TOOL), run_name="__main__")
    lines = source.read_bytes().splitlines(keepends=True)
    assert (tmp_path / "correct.jsonl").read_bytes() == lines[0] + lines[3]
    text = capsys.readouterr().out
    assert "2 correct answers; left out: 2 incorrect, 1 truncated. 2 of 3 prompts with a correct answer." in text
    with pytest.raises(SystemExit, match="exists"):
        runpy.run_path(str(TOOL), run_name="__main__")


def test_a_function_of_the_user(tmp_path):
    file = tmp_path / "checks.py"
    file.write_text("def short(record):\n    return len(record['messages'][-1]['content']) < record['limit']\n")
    source = write(tmp_path / "a.jsonl", [record("abc", limit=4), record("abcd", limit=4)])
    filtered = filter_answers(source, tmp_path / "b.jsonl", load_check(f"{file}:short"))
    assert (filtered.kept, filtered.incorrect, filtered.prompts, filtered.solved) == (1, 1, 1, 1)
    write(source, [record("abc", limit=4), record("abc")])
    with pytest.raises(QADError, match="line 2: the check raised KeyError: 'limit'"):
        filter_answers(source, tmp_path / "c.jsonl", load_check(f"{file}:short"))
    assert not (tmp_path / "c.jsonl").exists()


def test_what_cannot_be_checked_is_an_error(tmp_path):
    source = write(tmp_path / "a.jsonl", [record("42", answer="unknown")])
    with pytest.raises(QADError, match="line 1: \"answer\" is 'unknown', expected a number"):
        filter_answers(source, tmp_path / "b.jsonl", is_same_number)
    with pytest.raises(QADError, match="none of its 1 answers is correct"):
        filter_answers(write(source, [record("41")]), tmp_path / "b.jsonl", is_same_number)
    for line in ("{", '{"text": "42"}', '{"messages": [{"role": "user", "content": "42"}]}', "[]"):
        source.write_text(line)
        with pytest.raises(QADError, match='line 1: expected an object whose "messages" end with an answer'):
            filter_answers(source, tmp_path / "b.jsonl", is_same_number)
    with pytest.raises(FileNotFoundError):  # entry_point explains it
        filter_answers(tmp_path / "absent.jsonl", tmp_path / "b.jsonl", is_same_number)
    for name, message in (("number", "expected 'numeric' or"), (f"{__file__}:absent", "has no function 'absent'")):
        with pytest.raises(QADError, match=message):
            load_check(name)
    broken = tmp_path / "broken.py"
    broken.write_text("import absent_module")
    with pytest.raises(QADError, match="raised ModuleNotFoundError"):
        load_check(f"{broken}:check")
