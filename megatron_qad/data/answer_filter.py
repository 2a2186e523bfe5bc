"""Keeps the generated answers that are correct: by a numeric comparison, or by a function of the user.

The paper (arXiv:2601.20088, Table 5) compares data of correct answers only with all answers.
"""

import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import locks
from megatron_qad.engine.system_errors import naming

type Check = Callable[[dict[str, Any]], bool]
"""Whether the answer of a record is correct."""

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?:\s*/\s*\d+)?(?![\d/])")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([-+]?\d+)\s*\}\s*\{\s*(\d+)\s*\}")


@dataclass(frozen=True)
class Filtered:
    """Numbers of records of ``filter_answers``."""

    kept: int
    incorrect: int
    truncated: int
    """Answers that reached their maximum length. They are not checked and not kept."""
    prompts: int
    """Number of different prompts."""
    solved: int
    """Prompts with at least one correct answer."""


def filter_answers(source: str | Path, output: str | Path, check: Check) -> Filtered:
    """Copy the records with correct answers, unchanged and in order, to a new JSONL file.

    Args:
        source: JSONL file of ``megatron-qad generate``, from prompts.
        output: file to write; appears when it is complete.
        check: see ``load_check``.

    Raises:
        QADError: a line is not such a record, the check failed, no answer is correct, or the output exists.

    Example::

        filtered = filter_answers("answers.jsonl", "correct.jsonl", is_same_number)
        print(filtered.kept, "of", filtered.kept + filtered.incorrect + filtered.truncated)
    """
    output = Path(output)
    if output.exists():
        raise QADError(f"{output}: exists. Choose another file or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(output.name + ".incomplete")
    counts, solved = Counter(), {}
    with naming(output), locks.lock_output(output), aside.open("wb") as stream:
        for number, line, record in _records(Path(source)):
            prompt = json.dumps(record["messages"][:-1])
            verdict = _verdict(record, check, f"{source}, line {number}")
            counts[verdict] += 1
            solved[prompt] = solved.get(prompt, False) or verdict == "kept"
            if verdict == "kept":
                stream.write(line)
    if not counts["kept"]:
        aside.unlink()
        raise QADError(f"{source}: none of its {counts.total()} answers is correct. {output} was not written.")
    os.replace(aside, output)
    return Filtered(counts["kept"], counts["incorrect"], counts["truncated"], len(solved), sum(solved.values()))


def _verdict(record: dict[str, Any], check: Check, where: str) -> str:
    """Return "kept", "incorrect" or "truncated"."""
    if record.get("finish") == "length":
        return "truncated"
    try:
        return "kept" if check(record) else "incorrect"
    except QADError as error:
        raise QADError(f"{where}: {error}") from error
    except Exception as error:  # the user's function
        raise QADError(
            f"{where}: the check raised {type(error).__name__}: {error}. It must return whether the answer is correct."
        ) from error


def load_check(name: str) -> Check:
    """Return the check that ``--check`` names: "numeric", or FILE.py:FUNCTION, which gets a record and returns a bool.

    Raises:
        QADError: the file cannot be executed or has no such function.
    """
    if name == "numeric":
        return is_same_number
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise QADError(f"--check {name}: expected 'numeric' or FILE.py:FUNCTION with an existing file.")
    spec = importlib.util.spec_from_file_location("qad_check", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file
        raise QADError(f"--check {name}: {file} raised {type(error).__name__}: {error}") from error
    if not callable(found := getattr(module, function, None)):
        raise QADError(f"--check {name}: {file} has no function {function!r}.")
    return found


def is_same_number(record: dict[str, Any]) -> bool:
    """Whether the last number of the assistant's answer equals the record's "answer", as an exact fraction.

    A number in the last ``\\boxed{...}`` takes precedence. Thoughts before ``</think>`` do not count. Known forms:
    1,234.5; -2e3; 3/4; ``\\frac{3}{4}``. Of a reference with text, such as GSM8K's ``... #### 42``, the last number is
    used.

    Raises:
        QADError: the record has no "answer" with a number.
    """
    reference = _last_number(str(record.get("answer", "")))
    if reference is None:
        raise QADError(f'"answer" is {record.get("answer")!r:.80}, expected a number as the reference.')
    text = record["messages"][-1]["content"].rpartition("</think>")[2]
    boxed = _BOXED.findall(text)
    return _last_number(boxed[-1] if boxed else text) == reference


def _last_number(text: str) -> Fraction | None:
    text = _FRACTION.sub(r"\1/\2", text).replace("\\!", "").replace("{,}", ",")
    for found in reversed(_NUMBER.findall(text)):
        number, _, divisor = found.replace(",", "").replace(" ", "").partition("/")
        if not divisor or int(divisor):
            return Fraction(number) / int(divisor or 1)
    return None


def _records(source: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Yield (line number, line, record) of a file of answers."""
    with naming(source), source.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                turn = record["messages"][-1]
                is_answer = turn["role"] == "assistant" and isinstance(turn["content"], str)
            except (ValueError, LookupError, TypeError):
                is_answer = False
            if not is_answer:
                raise QADError(
                    f'{source}, line {number}: expected an object whose "messages" end with an answer of the '
                    f"assistant, found {line[:80]!r}."
                )
            yield number, line if line.endswith(b"\n") else line + b"\n", record
