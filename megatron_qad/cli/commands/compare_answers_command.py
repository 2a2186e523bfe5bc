"""Compares length and repetition of sampled answers with the teacher's, to the same prompts.

    megatron-qad generate --model TEACHER_HF --prompts prompts.txt --output teacher.jsonl
    megatron-qad generate --model EXPORT --prompts prompts.txt --output qad.jsonl
    megatron-qad compare-answers teacher=teacher.jsonl QAD=qad.jsonl [--tokenizer TEACHER_HF]

The first file is the teacher's. Lengths are numbers of tokens with --tokenizer, else of words (docs/evaluate.md).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine.named_paths import parse_named
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.system_errors import naming


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("compare-answers", __doc__)
    parser.add_argument("files", nargs="+", metavar="NAME=JSONL", help="answers of the teacher, then of the students")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face directory, to count lengths in tokens")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from megatron_qad.evaluation.answers import compare_answers, read_answers
    from megatron_qad.evaluation.token_classes import TokenTexts

    files = {name: read_answers(file) for name, file in parse_named(options.files, "JSONL").items()}
    length = None if options.tokenizer is None else TokenTexts(options.tokenizer).length
    result = compare_answers(files, length)
    unit = "words" if length is None else "tokens"
    print(f"{len(next(iter(files.values())))} answers; lengths in {unit}; brackets: 95 % intervals, drawn by prompt.\n")
    sys.stdout.write(_table(result) + "\n")
    if options.output is not None:
        with naming(options.output):
            json_records.write(options.output, {"unit": unit, "models": {n: _record(r) for n, r in result.items()}})


def _record(values: dict) -> dict:
    from megatron_qad.evaluation.bootstrap import Interval

    return {name: value.record() if isinstance(value, Interval) else value for name, value in values.items()}


def _table(result: dict) -> str:
    from megatron_qad.evaluation.comparison_tables import interval, table

    def cell(values: dict, name: str, spec: str) -> str:
        value = values.get(name)
        return "-" if value is None else interval(value.record(), spec)

    rows = [
        [name, cell(r, "length", ".1f"), cell(r, "length_ratio", ".3f")]
        + ["unknown" if r["ended"] is None else f"{r['ended']:.1%}"]
        + [cell(r, "repetition", ".2%"), cell(r, "repetition_difference", "+.2%")]
        for name, r in result.items()
    ]
    heads = ["model", "length", "/ teacher's", "ended", "repeated sequences of 4 words", "- teacher's"]
    return table(heads, rows, left=1)
