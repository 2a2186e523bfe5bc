"""The cells of a table, from the records and answers that ``run.py`` has written.

Intervals are 95 % of 2,000 draws of rows (KL) or of problems (accuracies). With several seeds, a value is the mean over
the seeds, the range of a KL is that of the seeds, and a problem counts with its mean over the seeds.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from experiments import MODELS, STUDENTS, TABLES, is_hybrid
from problems import is_right

from megatron_qad.evaluation import record
from megatron_qad.evaluation.bootstrap import Interval, RowBootstrap

DOMAINS = ("sums", "letters")
MAX_SEEDS = 10
"""Seeds are smaller."""


def label(row: str, seed: int) -> str:
    """Return the name of a row's run: of a model itself, of PTQ, which needs no seed, always the first."""
    if row in MODELS:
        return row
    return f"{row}-{seed if STUDENTS[row].loss else 1}"


def labels(row: str, output: Path) -> list[str]:
    """Return the finished runs of a row."""
    names = [row] if row in MODELS else sorted({label(row, seed) for seed in range(MAX_SEEDS)})
    return [
        name for name in names if all((output / f"log/{job}/{name}.done").is_file() for job in ("answers", "records"))
    ]


def table(name: str, output: Path) -> str:
    """Return a table as Markdown."""
    about = TABLES[name]
    teacher = about.teacher
    questions, domain_of = list(right(teacher, output)), domains(output)
    domain = np.array([domain_of[question] for question in questions])
    bases = {row: _mean_right(row, questions, output) for row in (teacher, about.student)}
    lines = [f"### {about.title}", "", about.paper, ""]
    columns = ["", "seeds", "KL to BF16", "cross entropy", "sums right", "letters right", "all right"]
    columns += [f"difference to {about.rows[row]}" for row in (teacher, about.student)]
    lines += [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for row, title in about.rows.items():
        runs = labels(row, output)
        per_problem = _mean_right(row, questions, output)
        cells = [title, str(len(runs)), *_token_cells(row, teacher, runs, output)]
        cells += [f"{per_problem[domain == name].mean():.3f}" for name in DOMAINS]
        cells.append(_cell(mean_of_problems(per_problem), 3))
        for other, base in bases.items():
            is_shown = row != other and not (other in STUDENTS and row in MODELS)
            cells.append(_cell(mean_of_problems(per_problem - base), 3, "+") if is_shown else "")
        lines.append(f"| {' | '.join(cells)} |")
    noise = output / "records" / label(f"{teacher}/qad", 1) / "noise.json"
    if noise.is_file():
        lines += ["", f"Noise floor of the KL: {json.loads(noise.read_text())['floor']:.5f}."]
    return "\n".join(lines) + "\n"


def _token_cells(row: str, teacher: str, runs: list[str], output: Path) -> list[str]:
    evaluations = [record.load(output / "records" / run) for run in runs]
    entropies = np.mean([e.tokens["cross_entropy"].mean(dtype=float) for e in evaluations])
    if row in MODELS:
        return ["0" if row == teacher else "", f"{entropies:.4f}"]
    means = [e.tokens["kl_to_teacher"].mean(dtype=float) for e in evaluations]
    if len(means) > 1:
        interval = Interval(float(np.mean(means)), min(means), max(means))
    else:
        interval = RowBootstrap(evaluations[0].tokens["row"]).mean(evaluations[0].tokens["kl_to_teacher"])
    return [_cell(interval, 4), f"{entropies:.4f}"]


def _cell(interval: Interval, digits: int, sign: str = "") -> str:
    values = [
        f"{value:{sign}.{digits}f}" for value in (interval.value, interval.low, interval.high) if value is not None
    ]
    return values[0] + (f" ({values[1]} to {values[2]})" if len(values) == 3 else "")


def mean_of_problems(values: np.ndarray) -> Interval:
    """Return the mean over problems of ``values`` [problems]."""
    return RowBootstrap(np.arange(len(values))).mean(values)


def _mean_right(row: str, questions: list[str], output: Path) -> np.ndarray:
    """Return how often each question is answered right, the mean over the runs of a row, float [questions]."""
    answers = [right(run, output) for run in labels(row, output)]
    assert all(list(of_run) == questions for of_run in answers), f"{row}: answers to other questions"
    return np.mean([list(of_run.values()) for of_run in answers], axis=0)


def right(run: str, output: Path) -> dict[str, float]:
    """Return how often each held-out problem is answered right, by question, in the same order for all runs.

    Of sampled answers, 0 or 1. Of a hybrid, the probability that it writes one of the right answers, at once or in
    steps; problems with an answer that the end of a row cuts are left out.
    """
    if not is_hybrid(run):
        lines = _read(output / f"answers/{run}.jsonl")
        return {line["messages"][0]["content"]: float(is_right(line)) for line in lines}
    answers = Counter(line["messages"][0]["content"] for line in _read(output / "inputs/heldout_answers.jsonl"))
    found = _probabilities(output / "answers" / run, output / "inputs/hybrid")
    return {question: sum(found[question]) for question, count in answers.items() if len(found[question]) == count}


def _probabilities(directory: Path, tokenizer: Path) -> dict[str, list[float]]:
    """Return the probability of each whole answer in a record, by question: exp of the sum of its tokens' log p."""
    from transformers import AutoTokenizer

    evaluation, tokenizer = record.load(directory), AutoTokenizer.from_pretrained(tokenizer)
    tokens, found = evaluation.tokens, defaultdict(list)
    for chat in np.unique(np.stack([tokens["row"], tokens["column"] - tokens["position"]]), axis=1).T:
        of_chat = (tokens["row"] == chat[0]) & (tokens["column"] - tokens["position"] == chat[1])
        question = tokenizer.decode(evaluation.rows[chat[0], chat[1] : tokens["column"][of_chat][0] + 1])
        is_whole = question.startswith("<s>") and tokens["label"][of_chat][-1] == tokenizer.eos_token_id
        if is_whole:
            log_p = -tokens["cross_entropy"][of_chat].astype(np.float64).sum()
            found[question.removeprefix("<s><|user|>").removesuffix("<|assistant|>")].append(float(np.exp(log_p)))
    return found


def domains(output: Path) -> dict[str, str]:
    """Return the domain of each held-out question."""
    return {line["prompt"]: line["domain"] for line in _read(output / "inputs/heldout_prompts.jsonl")}


def _read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]
