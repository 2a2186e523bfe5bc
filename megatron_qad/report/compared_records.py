"""Evaluation records for the run report."""

from collections.abc import Sequence
from pathlib import Path

from megatron_qad.engine.errors import QADError
from megatron_qad.evaluation.comparison import compare
from megatron_qad.evaluation.record import load_named
from megatron_qad.evaluation.token_classes import TokenTexts


def compare_records(records: Sequence[str], tokenizer: str | Path, is_required: bool, notes: list[str]) -> dict | None:
    """Return the comparison of evaluation records; None if there is none.

    Args:
        records: RECORD or NAME=RECORD; the first is the baseline.
        tokenizer: Hugging Face directory for the texts of tokens.
        is_required: whether a tokenizer that cannot be loaded is an error. If not, tokens are shown by their ids, and
            ``notes`` gets a sentence.

    Raises:
        QADError: a missing or damaged record, or records that cannot be compared.
    """
    if not records:
        return None
    evaluations = [load_named(text) for text in records]
    texts = None
    try:
        texts = TokenTexts(tokenizer)
    except QADError as error:
        if is_required:
            raise
        notes.append(f"The texts of tokens are unknown, so ids are shown and classes are left out: {error}")
    return compare(evaluations, texts=texts)
