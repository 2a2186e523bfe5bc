"""Prints the table of the example from the records of its evaluations, and checks what must hold.

A greedy answer is right if every token of the held-out answer is the model's most likely token after the tokens before
it: then greedy decoding writes exactly this answer. Intervals of accuracies are Wilson's; those of the KL and of
differences are 95 % of 2,000 draws of chats with replacement, the same draws for all models of a teacher.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_qad.engine import megatron_warnings  # noqa: E402
from megatron_qad.evaluation import record  # noqa: E402

MODELS = {"teacher": "BF16 teacher", "ptq": "PTQ", "qat": "QAT"}
MODELS |= {"qad_images": "QAD, images and text", "qad_text": "QAD, text only"}
TEACHERS = {"a": "A: one stage", "b": "B: two stages"}
NUM_DRAWS = 2000
Z = 1.96
"""Quantile of the normal distribution for 95 %."""


@dataclass(frozen=True)
class Chats:
    """The held-out chats of a record, in order."""

    has_image: np.ndarray
    """bool [chats]"""
    is_right: np.ndarray
    """bool [chats], whether the greedy answer is the held-out one."""
    kl: np.ndarray
    """Sum of the KL to the teacher over the counted tokens, [chats]."""
    num_tokens: np.ndarray
    """[chats]"""


def read_chats(directory: Path, user_id: int, image_id: int) -> Chats:
    """Group the tokens of a record by chat, each of which begins with the token of the user."""
    evaluation = record.load(directory)
    rows, tokens = evaluation.rows, evaluation.tokens
    number = np.cumsum((rows == user_id).ravel()).reshape(rows.shape) - 1
    of_token = number[tokens["row"], tokens["column"]]
    count = int(number.max()) + 1
    wrong = np.bincount(of_token, tokens["student_top"] != tokens["label"], count)
    images = np.bincount(number[rows == image_id], minlength=count)
    num_tokens = np.bincount(of_token, minlength=count)
    kl = np.bincount(of_token, tokens["kl_to_teacher"].astype(np.float64), count)
    counted = num_tokens > 0
    return Chats(images[counted] > 0, wrong[counted] == 0, kl[counted], num_tokens[counted])


def wilson(right: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share."""
    share, square = right / total, Z * Z / total
    center, half = share + square / 2, Z * math.sqrt(share * (1 - share) / total + square / total / 4)
    return (center - half) / (1 + square), (center + half) / (1 + square)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output directory of run.sh")
    run = parser.parse_args().run
    ids = token_ids(run / "inputs/hf")
    failures = []
    for teacher, title in TEACHERS.items():
        chats = {model: read_chats(run / "records" / f"{teacher}-{model}", *ids) for model in MODELS}
        print(f"\n### Teacher {title}\n")
        print("| | KL after images | KL on text | right answers, images | right answers, text |\n|---|---|---|---|---|")
        for model, name in MODELS.items():
            cells = [kl_cell(chats[model], image) for image in (True, False)]
            cells += [accuracy_cell(chats[model], image) for image in (True, False)]
            print(f"| {name} | {' | '.join(cells)} |")
        print("\n| difference | KL after images | right answers, images |\n|---|---|---|")
        for first, second in (("qad_images", "qad_text"), ("qad_images", "qat"), ("qad_images", "ptq")):
            cells = difference_cells(chats[first], chats[second])
            print(f"| {MODELS[first]} - {MODELS[second]} | {' | '.join(cells)} |")
        failures += [f"teacher {title}: {text}" for text in problems(chats)]
    if failures:
        sys.exit("error: " + "; ".join(failures))


def token_ids(directory: Path) -> tuple[int, int]:
    """Return the ids of the user's token and of the image token."""
    from transformers import AutoTokenizer

    megatron_warnings.hide()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.convert_tokens_to_ids("<image>")


def draws(count: int) -> np.ndarray:
    """Return how often each chat is drawn, [NUM_DRAWS, count]."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), NUM_DRAWS)


def kl_cell(chats: Chats, image: bool) -> str:
    chosen = chats.has_image == image
    kl, num_tokens = chats.kl[chosen], chats.num_tokens[chosen]
    weights = draws(len(kl))
    low, high = np.quantile(weights @ kl / (weights @ num_tokens), (0.025, 0.975))
    return f"{kl.sum() / num_tokens.sum():.4f} [{low:.4f}, {high:.4f}]"


def accuracy_cell(chats: Chats, image: bool) -> str:
    right = chats.is_right[chats.has_image == image]
    low, high = wilson(int(right.sum()), len(right))
    return f"{right.mean():.3f} [{low:.3f}, {high:.3f}]"


def difference_cells(first: Chats, second: Chats) -> list[str]:
    """Return the paired differences of KL and accuracy on questions about pictures."""
    chosen = first.has_image
    weights, cells = draws(int(chosen.sum())), []
    for a, b, size in (
        (first.kl[chosen], second.kl[chosen], first.num_tokens[chosen]),
        (first.is_right[chosen], second.is_right[chosen], np.ones(int(chosen.sum()))),
    ):
        difference = a.astype(float) - b
        low, high = np.quantile(weights @ difference / (weights @ size), (0.025, 0.975))
        cells.append(f"{difference.sum() / size.sum():+.4f} [{low:+.4f}, {high:+.4f}]")
    return cells


def problems(chats: dict[str, Chats]) -> list[str]:
    """Return what is not as it must be: equal chats, and less KL after QAD with images than after PTQ."""
    teacher = chats["teacher"]
    found = [
        f"{model} was evaluated on other chats"
        for model, other in chats.items()
        if not np.array_equal(other.has_image, teacher.has_image)
        or not np.array_equal(other.num_tokens, teacher.num_tokens)
    ]
    if not found and chats["qad_images"].kl.sum() >= chats["ptq"].kl.sum():
        found.append("QAD with images and text has not reduced the KL of PTQ")
    return found


if __name__ == "__main__":
    main()
