"""Length and repetition of sampled answers."""

import json

import pytest

from megatron_qad.engine.errors import QADError
from megatron_qad.evaluation.answers import Answer, compare_answers, read_answers, repetition


def test_lines_of_generate_data_are_read(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], "finish": "eos"},
        {"text": "A document\u2028with a separator", "finish": "length"},
        {"text": ""},
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    assert read_answers(file) == [
        Answer("user: Why?", "So.", True),
        Answer("", "A document\u2028with a separator", False),
        Answer("", "", None),
    ]


@pytest.mark.parametrize("line", ["[]", "{}", '{"text": 1}', '{"messages": [{"role": "user", "content": "x"}]}', "{"])
def test_other_lines_are_refused_by_number(tmp_path, line):
    file = tmp_path / "answers.jsonl"
    file.write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(QADError, match=r"answers.jsonl, line 2"):
        read_answers(file)
    file.write_text("\n")
    with pytest.raises(QADError, match="has no line"):
        read_answers(file)


def test_repetition():
    assert repetition("a b c") == repetition("") == repetition("a b c d e f") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a " * 100) == pytest.approx(96 / 97)


def test_ratio_of_lengths_is_paired():
    teacher = [Answer(f"p{i}", "word " * (i + 1), True) for i in range(30)]
    student = [Answer(a.prompt, a.text * 2, i % 3 > 0) for i, a in enumerate(teacher)][::-1]  # another order
    result = compare_answers({"teacher": teacher, "QAD": student})
    ratio = result["QAD"]["length_ratio"]
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert result["teacher"]["length"].value == 15.5 and result["teacher"]["ended"] == 1.0
    assert result["QAD"]["ended"] == pytest.approx(20 / 30)
    assert result["QAD"]["repetition_difference"].low > 0


def test_other_prompts_are_refused():
    teacher = [Answer("p", "a", True)]
    with pytest.raises(QADError, match="QAD: has no answer to a prompt of teacher: 'p'"):
        compare_answers({"teacher": teacher, "QAD": [Answer("q", "a", True)]})
    with pytest.raises(QADError, match="QAD: has 1 more answers than teacher"):
        compare_answers({"teacher": teacher, "QAD": teacher * 2})
