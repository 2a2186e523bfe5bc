"""Compares benchmark results of several models: intervals over problems, paired differences, and conclusions.

    megatron-qad compare-benchmarks BF16=results/bf16 PTQ=results/ptq QAD=results/qad --teacher BF16 --baseline PTQ

Answers whether the deficit of the baseline is larger than noise, and whether the others are within noise of the teacher
(docs/benchmarking.md).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.named_paths import parse_named
from megatron_qad.engine.run_directory import json_records
from megatron_qad.engine.system_errors import naming


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("compare-benchmarks", __doc__)
    parser.add_argument("results", nargs="+", metavar="NAME=RESULTS", help="directories of megatron-qad benchmark")
    parser.add_argument("--teacher", help="name of the teacher's results (default: the first)")
    parser.add_argument("--baseline", help="name of the quantized model before training, such as PTQ")
    parser.add_argument("--metric", help="METRIC,FILTER of all tasks (default: the first of each)")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    from megatron_qad.evaluation import benchmark_results
    from megatron_qad.evaluation.benchmark_comparison import compare_benchmarks, report

    named = parse_named(options.results, "RESULTS")
    results = {name: benchmark_results.load(directory) for name, directory in named.items()}
    teacher = options.teacher or next(iter(results))
    for flag, name in (("--teacher", teacher), ("--baseline", options.baseline)):
        if name is not None and name not in results:
            raise QADError(f"{flag} {name}: no such results. Choose one of {', '.join(results)}.")
    if teacher == options.baseline:
        raise QADError(f"--baseline {teacher}: is also the teacher. Choose the PTQ model.")
    compared = compare_benchmarks(results, options.metric)
    sys.stdout.write(report(compared, teacher, options.baseline))
    if options.output is not None:
        content = {"teacher": teacher, "baseline": options.baseline, **compared.record()}
        with naming(options.output):
            json_records.write(options.output, content)
