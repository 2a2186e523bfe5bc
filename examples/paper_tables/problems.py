"""The tasks of the experiment: sums with a scratchpad, and letters to sort.

An answer to a sum is either the result alone, or a scratchpad with one step for each digit, from the last to the
first, and the result after it. A step is ``digit+digit+carry=sum``:

    question  4821+1793
    at once   6614
    steps     1+3+0=04;2+9+0=11;8+7+1=16;4+1+1=06;6614

A small model is rarely right at once and can learn the steps. Letters are sorted at once.
"""

import re
from dataclasses import dataclass

import numpy as np

NUM_DIGITS = 4
NUM_LETTERS = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Problem:
    """A question with one right result."""

    domain: str
    """"sums" or "letters"."""
    question: str
    result: str

    @property
    def at_once(self) -> str:
        """The answer without a scratchpad."""
        return self.result

    @property
    def in_steps(self) -> str:
        """The answer with a scratchpad; letters have none."""
        if self.domain == "letters":
            return self.result
        first, second = self.question.split("+")
        carry, steps = 0, []
        for a, b in zip(reversed(first), reversed(second), strict=True):
            total = int(a) + int(b) + carry
            steps.append(f"{a}+{b}+{carry}={total:02d}")
            carry = total // 10
        return ";".join([*steps, self.result])


def random_sum(rng: np.random.Generator) -> Problem:
    """Return a sum of two numbers of ``NUM_DIGITS`` digits."""
    first, second = rng.integers(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS, 2)
    return Problem("sums", f"{first}+{second}", str(first + second))


def random_letters(rng: np.random.Generator) -> Problem:
    """Return a question with ``NUM_LETTERS`` letters to sort, some of which may be equal."""
    letters = rng.choice(list(LETTERS), NUM_LETTERS)
    return Problem("letters", f"sort {' '.join(letters)}", " ".join(sorted(letters)))


RANDOM = {"sums": random_sum, "letters": random_letters}


def spoiled(problem: Problem, answer: str, rng: np.random.Generator) -> str:
    """Return an answer with one mistake: two neighboring letters swapped, or one digit replaced."""
    if problem.domain == "letters":
        letters = answer.split()
        different = [i for i in range(len(letters) - 1) if letters[i] != letters[i + 1]]
        i = rng.choice(different)
        letters[i : i + 2] = letters[i + 1], letters[i]
        return " ".join(letters)
    places = [match.start() for match in re.finditer(r"\d", answer)]
    i = rng.choice(places)
    return answer[:i] + str((int(answer[i]) + rng.integers(1, 10)) % 10) + answer[i + 1 :]


def is_right(record: dict) -> bool:
    """Return whether the last message of a chat ends with the right result; for ``megatron-qad filter --check``."""
    return record["messages"][-1]["content"].split(";")[-1].strip() == record["result"]


def is_answer(record: dict) -> bool:
    """Return whether there is an answer, for trials whose models are never right."""
    return record["messages"][-1]["role"] == "assistant"
