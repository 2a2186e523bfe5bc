"""Length and repetition of sampled answers, compared with the teacher's answers to the same prompts.

A student with a low KL on given text may still write longer or more repetitive answers than its teacher. The answers
are lines of ``megatron-qad generate``, or of any tool that writes ``{"messages": ...}`` or ``{"text": ...}``.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.text_files import parse_json, read_text
from megatron_qad.evaluation.bootstrap import Interval, RowBootstrap

NGRAM = 4
"""Number of words of the sequences whose repetition is counted."""


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    prompt: str
    """The messages before it as text; empty for a document that was written without a prompt."""
    text: str
    ended: bool | None
    """Whether the model ended it, instead of reaching the maximum length. None if the line does not say."""


def read_answers(file: str | Path) -> list[Answer]:
    """Read the answers of a JSONL file.

    Raises:
        QADError: the file is missing or empty, or a line is not an answer.
    """
    answers = list(_lines(Path(file)))
    if not answers:
        raise QADError(f"{file}: has no line. Expected answers of megatron-qad generate.")
    return answers


def _lines(file: Path) -> Iterator[Answer]:
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        content = parse_json(line, where, advice="Give the JSONL file of megatron-qad generate.")
        answer = content if isinstance(content, dict) else {}
        messages, text, prompt = answer.get("messages"), answer.get("text"), ""
        if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
            text = messages[-1].get("content") if messages[-1].get("role") == "assistant" else None
            prompt = "\n".join(f"{m.get('role')}: {m.get('content')}" for m in messages[:-1])
        if not isinstance(text, str):
            raise QADError(
                f"{where}: has neither a text nor messages that end with an assistant's. Give the JSONL file of "
                "megatron-qad generate."
            )
        finish = answer.get("finish")
        yield Answer(prompt, text, None if finish is None else finish in ("eos", "stop"))


def repetition(text: str) -> float:
    """Return the share of the sequences of four words that occurred before in the text; 0 for shorter texts.

    Example:
        >>> repetition("a b c d a b c d")
        0.2
    """
    words = text.split()
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def compare_answers(
    files: Mapping[str, Sequence[Answer]], length: Callable[[str], int] | None = None, num_samples: int = 2000
) -> dict[str, dict[str, Interval | float | None]]:
    """Compare the answers of several models to the same prompts with those of the first, the teacher.

    Args:
        files: answers by the name of the model. The n-th answers to a prompt are compared with each other.
        length: length of a text. None: its number of words.
        num_samples: draws of the bootstrap, which draws prompts.

    Returns:
        For each model "length" and "repetition" (means with intervals), "ended" (share, None if unknown), and for all
        but the first "length_ratio" and "repetition_difference" (paired).

    Raises:
        QADError: the models have answered other prompts.
    """
    length = length or (lambda text: len(text.split()))
    teacher, *_ = files
    aligned = {name: _in_order_of(files[teacher], answers, name, teacher) for name, answers in files.items()}
    prompts = {answer.prompt: i for i, answer in enumerate(files[teacher])}
    # Documents without a prompt are independent; answers to one prompt are drawn together.
    rows = np.array([prompts[a.prompt] if a.prompt else i for i, a in enumerate(files[teacher])])
    bootstrap = RowBootstrap(rows, num_samples)
    lengths = {name: np.array([length(a.text) for a in answers], float) for name, answers in aligned.items()}
    repeated = {name: np.array([repetition(a.text) for a in answers]) for name, answers in aligned.items()}
    result = {}
    for name, answers in aligned.items():
        ended = [a.ended for a in answers]
        result[name] = {
            "length": bootstrap.mean(lengths[name]),
            "repetition": bootstrap.mean(repeated[name]),
            "ended": None if None in ended else float(np.mean(ended)),
        }
        if name != teacher:
            result[name]["length_ratio"] = bootstrap.ratio(lengths[name], lengths[teacher])
            result[name]["repetition_difference"] = bootstrap.difference(repeated[name], repeated[teacher])
    return result


def _in_order_of(expected: Sequence[Answer], answers: Sequence[Answer], name: str, teacher: str) -> list[Answer]:
    """Return ``answers`` in the order of the teacher's prompts."""
    waiting: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        waiting[answer.prompt].append(answer)
    ordered = []
    for answer in expected:
        if not waiting[answer.prompt]:
            raise QADError(f"{name}: has no answer to a prompt of {teacher}: {answer.prompt[:80]!r}. Sample it again.")
        ordered.append(waiting[answer.prompt].pop(0))
    if rest := sum(map(len, waiting.values())):
        raise QADError(f"{name}: has {rest} more answers than {teacher}. Sample both from the same prompts.")
    return ordered
