"""Comparison of several evaluations on the same tokens: means, differences, percentiles, positions and classes."""

from collections.abc import Sequence

import numpy as np

from megatron_qad.distillation.token_metrics import TOKEN_METRICS
from megatron_qad.engine.errors import QADError
from megatron_qad.evaluation.bootstrap import RowBootstrap
from megatron_qad.evaluation.record import Evaluation
from megatron_qad.evaluation.token_classes import CLASSES, TokenTexts

PERCENTILES = (50, 90, 99, 99.9)
"""Percentiles of the KL over tokens."""
NUM_WORST = 10
CONTEXT = 24
"""Number of tokens of text before a token with a large KL."""
_SHARED = ("label", "row", "column", "position")
_MOST_DIFFERENT = 0.05
"""Share of tokens on which one teacher may differ from itself in its most likely token, computed with other rounding
errors. Larger than what is seen in BF16, a few per mille."""
_METRIC = "kl_to_teacher"


def compare(
    evaluations: Sequence[Evaluation],
    baseline: str | None = None,
    texts: TokenTexts | None = None,
    num_samples: int = 2000,
    num_worst: int = NUM_WORST,
) -> dict:
    """Return the contents of comparison.json.

    Args:
        baseline: name of the evaluation with which the others are compared. None: the first.
        texts: texts of tokens. None leaves out classes; contexts are then token ids.
        num_samples: draws of the bootstrap.
        num_worst: number of the tokens with the largest KL of each evaluation.

    Raises:
        QADError: evaluations on different tokens or against different teachers, equal names, or an unknown baseline.
    """
    notes = check_comparable(evaluations)
    base = _find(evaluations, baseline)
    bootstrap = RowBootstrap(base.tokens["row"], num_samples)
    groups = {"position": _position_groups(base.tokens["position"])}
    if texts is not None:
        groups["class"] = _class_groups(base.tokens["label"], texts)
    return {
        "baseline": base.name,
        "num_tokens": len(base.tokens["row"]),
        "num_rows": bootstrap.num_rows,
        "num_samples": num_samples,
        "tokens_sha256": base.about["tokens_sha256"],
        "notes": notes,
        "groups": {kind: {name: int(mask.sum()) for name, mask in of_kind.items()} for kind, of_kind in groups.items()},
        "evaluations": [
            _compared(evaluation, base, bootstrap, groups) | {"worst": worst_tokens(evaluation, texts, num_worst)}
            for evaluation in evaluations
        ],
    }


def check_comparable(evaluations: Sequence[Evaluation]) -> list[str]:
    """Check that the evaluations have read the same tokens and have the same teacher. Returns notes for the reader.

    Raises:
        QADError: they have not, or two have one name.
    """
    if not evaluations:
        raise QADError("no evaluation to compare. Give the --output of one or more megatron-qad evaluate.")
    first, seen, notes = evaluations[0], set(), []
    for evaluation in evaluations:
        if evaluation.name in seen:
            raise QADError(f"two evaluations are called {evaluation.name!r}. Name them: NAME=RECORD.")
        seen.add(evaluation.name)
        for key in ("tokens_sha256", "num_tokens"):
            if (found := evaluation.about[key]) != (expected := first.about[key]):
                raise QADError(
                    f"{evaluation.name} was evaluated on other tokens than {first.name}: {key} is {found}, expected "
                    f"{expected}. Evaluate both with the same data, --split, --seq-length and --eval-iters."
                )
        if not all(np.array_equal(evaluation.tokens[name], first.tokens[name]) for name in _SHARED):
            raise QADError(f"{evaluation.name} counts other tokens than {first.name}. Evaluate both again.")
        differing = float(np.mean(evaluation.tokens["teacher_top"] != first.tokens["teacher_top"]))
        if differing > _MOST_DIFFERENT:
            raise QADError(
                f"{evaluation.name} was evaluated with another teacher than {first.name}: their most likely tokens "
                f"differ for {differing:.1%} of the tokens. Evaluate both with the same --qad-teacher and precision."
            )
        if not np.array_equal(evaluation.tokens["teacher_entropy"], first.tokens["teacher_entropy"]):
            notes.append(
                f"{evaluation.name} and {first.name} were evaluated with other rounding errors: another machine, "
                f"parallelism or microbatch size. The teacher's most likely token differs for {differing:.2%} of the "
                "tokens."
            )
    return notes


def worst_tokens(evaluation: Evaluation, texts: TokenTexts | None, number: int) -> list[dict]:
    """Return the tokens with the largest KL, largest first, with the text before each."""
    tokens, found = evaluation.tokens, []

    def text(ids: Sequence[int]) -> str:
        if texts is None:
            return " ".join(str(i) for i in ids)
        return texts.text(int(ids[0])) if len(ids) == 1 else texts.decode(ids)

    for i in np.argsort(-tokens[_METRIC], kind="stable")[:number]:
        row, column = int(tokens["row"][i]), int(tokens["column"][i])
        names = {"label": "token", "teacher_top": "teacher", "student_top": "student"}
        found.append(
            {"row": row, "column": column, "kl": float(tokens[_METRIC][i])}
            | {name: float(tokens[name][i]) for name in ("cross_entropy", "teacher_cross_entropy")}
            | {"context": text(evaluation.rows[row, max(0, column + 1 - CONTEXT) : column + 1])}
            | {shown: text([tokens[name][i]]) for name, shown in names.items()}
        )
    return found


def _find(evaluations: Sequence[Evaluation], name: str | None) -> Evaluation:
    found = {evaluation.name: evaluation for evaluation in evaluations}
    if name is not None and name not in found:
        raise QADError(f"--baseline {name}: is not one of {', '.join(found)}.")
    return evaluations[0] if name is None else found[name]


def _compared(evaluation: Evaluation, base: Evaluation, bootstrap: RowBootstrap, groups: dict) -> dict:
    tokens, of_base = evaluation.tokens, base.tokens
    kl = tokens[_METRIC]
    result = {key: evaluation.about.get(key) for key in ("name", "model", "iteration", "formats", "precision")}
    result["means"] = {name: bootstrap.mean(tokens[name]).record() for name in TOKEN_METRICS}
    if evaluation is not base:
        result["differences"] = {
            name: bootstrap.difference(tokens[name], of_base[name]).record() for name in TOKEN_METRICS
        }
        ratio = bootstrap.ratio(kl, of_base[_METRIC])
        result["kl_ratio"] = None if ratio is None else ratio.record()
    result["kl_percentiles"] = {str(p): float(np.percentile(kl, p)) for p in PERCENTILES} | {"max": float(kl.max())}
    for kind, of_kind in groups.items():
        result[f"kl_by_{kind}"] = {name: float(kl[mask].mean(dtype=np.float64)) for name, mask in of_kind.items()}
    return result


def _position_groups(position: np.ndarray) -> dict[str, np.ndarray]:
    """Return masks of the tokens whose positions are 0, 1, 2-3, 4-7, ...; position 0 predicts the second token."""
    groups, low, high = {}, 0, 1
    while low <= position.max():
        mask = (position >= low) & (position < high)
        if mask.any():
            groups[str(low) if high - low == 1 else f"{low}-{high - 1}"] = mask
        low, high = high, 2 * high
    return groups


def _class_groups(labels: np.ndarray, texts: TokenTexts) -> dict[str, np.ndarray]:
    ids, inverse = np.unique(labels, return_inverse=True)
    index = np.array([CLASSES.index(texts.class_of(int(i))) for i in ids])[inverse]
    masks = {name: index == i for i, name in enumerate(CLASSES)}
    return {name: mask for name, mask in masks.items() if mask.any()}
