"""Compares models that megatron-qad evaluate has evaluated on the same tokens: a table, and comparison.json.

    megatron-qad compare PTQ=records/ptq QAD=records/qad --tokenizer CKPT/hf --output DIR

Intervals are paired bootstraps over rows (docs/evaluate.md).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records, manifest
from megatron_qad.engine.system_errors import naming


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("compare", __doc__)
    parser.add_argument(
        "records", nargs="+", metavar="[NAME=]RECORD", help="--output directories of megatron-qad evaluate"
    )
    parser.add_argument("--baseline", help="name of the record with which others are compared (default: the first)")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face directory; adds texts and classes of tokens")
    parser.add_argument("--output", type=Path, help="directory for comparison.json and comparison.md")
    parser.add_argument("--num-samples", type=int, default=2000, help="draws of the bootstrap (default: 2000)")
    parser.add_argument("--num-worst", type=int, default=10, help="tokens with the largest KL (default: 10)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from megatron_qad.evaluation import comparison, record
    from megatron_qad.evaluation.comparison_tables import markdown
    from megatron_qad.evaluation.token_classes import TokenTexts

    if options.num_samples < 100 or options.num_worst < 0:
        raise QADError(
            f"--num-samples {options.num_samples}, --num-worst {options.num_worst}: expected at least 100 and 0."
        )
    evaluations = [record.load_named(text) for text in options.records]
    texts = None if options.tokenizer is None else TokenTexts(options.tokenizer)
    result = comparison.compare(evaluations, options.baseline, texts, options.num_samples, options.num_worst)
    text = markdown(result)
    if options.output is not None:
        with naming(options.output):
            options.output.mkdir(parents=True, exist_ok=True)
            json_records.write(options.output / "comparison.json", result)
            manifest.write_atomically(options.output / "comparison.md", text)
    sys.stdout.write(text)
