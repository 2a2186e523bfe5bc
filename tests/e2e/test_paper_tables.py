"""Runs every experiment of examples/paper_tables with few problems and two training steps."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from example_modules import imports_of_examples

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/paper_tables"
MINUTES = 20
"""Time limit. The run takes two to five minutes on a busy machine."""


@pytest.fixture(scope="module")
def example():
    """Return the example's modules by name."""
    with imports_of_examples("paper_tables"):
        return {name: importlib.import_module(name) for name in ("experiments", "problems", "make_inputs", "results")}


@pytest.mark.timeout(60 * MINUTES)
def test_every_table_in_two_steps(tmp_path, example):
    """Every table is complete, and a second call runs no job."""
    command = [sys.executable, str(EXAMPLE / "run.py"), "all", "--trial", "--output", str(tmp_path / "out")]
    first, second = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for _ in range(2)
    )
    assert first.returncode == 0, first.stdout[-4000:] + first.stderr[-2000:]
    assert second.returncode == 0 and "models/pretrained:" in first.stdout
    assert [line for line in second.stdout.splitlines() if line.startswith("[")] == [], "jobs ran again"
    for name, table in example["experiments"].TABLES.items():
        lines = (tmp_path / "out/tables" / f"{name}.md").read_text().splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
        assert [row[0] for row in rows] == list(table.rows.values())
        assert all(float(row[3]) > 0 for row in rows), "cross entropies"


def test_answers_in_steps_are_right_and_spoiled_ones_are_not(example):
    problems, rng = example["problems"], np.random.default_rng(0)
    for domain, make in problems.RANDOM.items():
        for problem in (make(rng) for _ in range(200)):
            chat = {"result": problem.result}
            for answer in (problem.at_once, problem.in_steps):
                assert problems.is_right(chat | {"messages": [{"content": answer}]})
            spoiled = problems.spoiled(problem, problem.at_once, rng)
            assert not problems.is_right(chat | {"messages": [{"content": spoiled}]}), (domain, problem)
    assert problems.Problem("sums", "4821+1793", "6614").in_steps == "1+3+0=04;2+9+0=11;8+7+1=16;4+1+1=06;6614"


def test_probability_of_right_answers(tmp_path, example):
    """The probabilities of a question's right answers are added. Questions whose answer is split are left out."""
    from transformers import AutoTokenizer

    from megatron_qad.distillation.token_metrics import TOKEN_METRICS
    from megatron_qad.evaluation import record

    inputs, run = tmp_path / "inputs", "rl_hybrid/qad-1"
    chats = {"1+2": ["3", "1+2+0=03;3"], "sort b a": ["a b"], "4+4": ["8", "4+4+0=08;8"]}
    example["make_inputs"].write_tokenizer(inputs / "hybrid", ["1+2+0=03;3 sort b a"])
    tokenizer = AutoTokenizer.from_pretrained(inputs / "hybrid")
    texts = [(q, f"<s><|user|>{q}<|assistant|>", f"{answer}</s>") for q in chats for answer in chats[q]]
    (inputs / "heldout_answers.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": q}]}) + "\n" for q, *_ in texts)
    )
    stream, log_ps = [], []  # (token, place in its chat, nats of the token after it, or None if that does not count)
    for i, (_, question, answer) in enumerate(texts):
        asked, answered = (tokenizer.encode(text, add_special_tokens=False) for text in (question, answer))
        nats = [None] * (len(asked) - 1) + [0.1 * (i + 1)] * len(answered) + [None]
        log_ps.append(-0.1 * (i + 1) * len(answered))
        stream += zip(asked + answered, range(len(asked + answered)), nats, strict=True)
    width = len(stream) - 4  # the end of the row cuts the last answer, whose rest is in the second row
    rows = np.zeros((2, width), np.int32)
    tokens = {name: [] for name in (*TOKEN_METRICS, *record.INTEGERS)}
    for place, (token, position, nats) in enumerate(stream):
        row, column = divmod(place, width)
        rows[row, column] = token
        if nats is None:
            continue
        values = {"row": row, "column": column, "label": stream[place + 1][0], "cross_entropy": nats}
        values["position"] = position if row == 0 else column
        for name, column_of in tokens.items():
            column_of.append(values.get(name, 0))
    arrays = {name: np.array(of, np.int32 if name in record.INTEGERS else np.float32) for name, of in tokens.items()}
    about = {"name": run, "tokens_sha256": "", "num_tokens": len(arrays["row"]), "means": {}}
    (tmp_path / "answers" / run).mkdir(parents=True)
    record.save(record.Evaluation(about, arrays, rows), tmp_path / "answers" / run)
    right = example["results"].right(run, tmp_path)
    p = np.exp(log_ps)
    assert list(right) == ["1+2", "sort b a"]
    assert right["1+2"] == pytest.approx(p[0] + p[1], rel=1e-5) and right["sort b a"] == pytest.approx(p[2], rel=1e-5)
