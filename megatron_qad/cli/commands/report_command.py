"""Write a run report: ``megatron-qad report --run PTQ=DIR --run QAD=DIR --teacher CHECKPOINT --output DIR``."""

import argparse
from collections.abc import Sequence

from megatron_qad.cli.command_parser import command_parser
from megatron_qad.engine import init_runtime
from megatron_qad.engine.named_paths import parse_named


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("report", __doc__)
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a run's --save directory, with TensorBoard events in DIR/tensorboard or DIR; repeat for each run, "
        "with the baseline first",
    )
    parser.add_argument(
        "--teacher", required=True, help="checkpoint of the BF16 teacher, written by megatron-qad import"
    )
    parser.add_argument("--output", required=True, help="directory for report.html, .md, .png and results.json")
    parser.add_argument("--title", help="title of the report")
    parser.add_argument(
        "--evaluations",
        nargs="+",
        default=[],
        metavar="[NAME=]RECORD",
        help="--output directories of megatron-qad evaluate, with the baseline first; a record with the name of a run "
        "gives its values intervals (docs/report.md)",
    )
    parser.add_argument("--tokenizer", help="Hugging Face directory for the texts of tokens (default: the teacher's)")
    parser.add_argument(
        "--export", action="append", default=[], metavar="DIR", help="--output of megatron-qad export; repeat for each"
    )
    parser.add_argument("--sensitivity", metavar="DIR", help="--output of megatron-qad sensitivity")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        default=[],
        metavar="NAME=RESULTS",
        help="--output directories of megatron-qad benchmark, with the teacher first",
    )
    parser.add_argument(
        "--accept-gaps",
        action="store_true",
        help="turn damaged or missing event files into notes instead of errors, and report the remaining data",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser().parse_args(argv)
    runs = parse_named(options.run, "DIR", "--run")
    init_runtime()

    from megatron_qad.engine.distributed import init_process_group
    from megatron_qad.report.collect import Inputs
    from megatron_qad.report.report import DEFAULT_TITLE, write_report

    init_process_group()
    title = options.title or DEFAULT_TITLE
    inputs = Inputs(options.evaluations, options.tokenizer, options.export, options.sensitivity, options.benchmarks)
    results = write_report(runs, options.teacher, options.output, title, inputs, accept_gaps=options.accept_gaps)
    for note in results.notes:
        print(f"note: {note}")
    print(f"wrote report.html, report.md, report.png and results.json to {options.output}")
