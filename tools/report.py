"""Report of runs: ``python tools/report.py --run PTQ=DIR --run QAD=DIR --teacher CHECKPOINT --output DIR``."""

import argparse
import sys

from megatron_qad.engine import QADError, init_runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="a run's --save directory, its TensorBoard events in DIR/tensorboard or DIR itself; repeat for each run, "
        "the one to compare with first",
    )
    parser.add_argument("--teacher", required=True, help="checkpoint of the BF16 teacher, made by tools/import_hf.py")
    parser.add_argument("--output", required=True, help="directory for report.md, report.png and results.json")
    parser.add_argument("--title", help="the report's heading")
    parser.add_argument(
        "--accept-gaps",
        action="store_true",
        help="report what is left of runs whose event files are damaged or missing, and say so; without it that is an "
        "error",
    )
    options = parser.parse_args()
    runs = parse_runs(options.run)
    init_runtime()

    from megatron_qad.engine.distributed import init_process_group
    from megatron_qad.report.report import DEFAULT_TITLE, write_report

    init_process_group()
    title = options.title or DEFAULT_TITLE
    results = write_report(runs, options.teacher, options.output, title, accept_gaps=options.accept_gaps)
    for note in results.notes:
        print(f"note: {note}")
    print(f"wrote report.md, report.png and results.json to {options.output}")


def parse_runs(pairs: list[str]) -> dict[str, str]:
    """["PTQ=DIR", ...] -> {"PTQ": "DIR", ...}."""
    runs = {}
    for pair in pairs:
        name, _, directory = pair.partition("=")
        if not name or not directory:
            raise QADError(f"--run {pair!r}: expected NAME=DIR, such as QAD=runs/qad")
        if name in runs:
            raise QADError(f"--run {pair!r}: the name {name!r} is given twice; each run needs its own")
        runs[name] = directory
    return runs


if __name__ == "__main__":
    try:
        main()
    except QADError as error:
        sys.exit(f"error: {error}")
