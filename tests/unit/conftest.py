"""Evaluations made of random numbers."""

import numpy as np
import pytest

from megatron_qad.distillation.token_metrics import TOKEN_METRICS
from megatron_qad.evaluation.record import Evaluation, means

ROWS, LENGTH = 30, 16


@pytest.fixture
def make_evaluation():
    """Return a maker of evaluations on one text: (name, factor) -> a model whose KL is ``factor`` times that of 1."""

    def make(name: str, factor: float = 1.0, seed: int = 0) -> Evaluation:
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, 50, size=(ROWS, LENGTH + 1)).astype(np.int32)
        row, column = (grid.ravel().astype(np.int32) for grid in np.mgrid[:ROWS, :LENGTH])
        hardness = rng.exponential(size=ROWS)[row]  # the tokens of a row vary together
        tokens = {metric: (hardness * rng.random(len(row))).astype(np.float32) for metric in TOKEN_METRICS}
        tokens["kl_to_teacher"] *= np.float32(factor)
        tokens |= {"row": row, "column": column, "position": column, "label": rows[:, 1:].ravel()}
        tokens |= {top: rng.integers(0, 50, size=len(row)).astype(np.int32) for top in ("student_top", "teacher_top")}
        about = {"name": name, "model": f"runs/{name}", "formats": "9 nvfp4", "precision": "bfloat16"}
        about |= {"tokens_sha256": f"text{seed}", "num_tokens": len(row), "means": means(tokens)}
        return Evaluation(about, tokens, rows[:, :-1])

    return make
