"""Prints a Markdown table of the results of compare_scale_rules.sh: one row for each start and scale rule."""

import argparse
import json
from pathlib import Path
from statistics import mean

from megatron_qad.report.runs import Run

COLUMNS = ("seeds", "PTQ: KL", "QAD: KL", "of PTQ", "noise floor", "QAD beyond it", "top-1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="output directory of compare_scale_rules.sh")
    parser.add_argument("starts", nargs="+", help="starts to list, such as plain and smoothed")
    options = parser.parse_args()
    print(f"| start | scales | {' | '.join(COLUMNS)} |")
    print("|---|---|" + "---:|" * len(COLUMNS))
    for start in options.starts:
        for noise in sorted(options.output.glob(f"{start}-*-noise.json"), key=lambda path: path.stat().st_mtime):
            name = noise.name.removesuffix("-noise.json")
            rule, update = name.removeprefix(f"{start}-").rsplit("-", 1)
            print(f"| {start} | {rule}, {update.replace('_', ' ')} | {' | '.join(row(options.output, name))} |")


def row(output: Path, name: str) -> list[str]:
    """Return the cells of one arm: means over its seeds, with the smallest and largest KL if there are several."""
    seeds = sorted(path for path in output.glob(f"{name}-[0-9]*") if (output / "log" / f"{path.name}.done").exists())
    ptq = output / f"{name}-ptq"
    ptq = Run.read("PTQ", ptq).validation["kl_to_teacher"] if ptq.is_dir() else None
    runs = [Run.read(path.name, path).validation for path in seeds]
    kls = [run["kl_to_teacher"] for run in runs]
    floor = json.loads((output / f"{name}-noise.json").read_text())["floor"]
    spread = f" ({min(kls):.5f} to {max(kls):.5f})" if len(kls) > 1 else ""
    return [
        str(len(seeds)),
        f"{ptq:.5f}" if ptq else "-",
        f"{mean(kls):.5f}{spread}",
        f"{mean(kls) / ptq:.2f}" if ptq else "-",
        f"{floor:.5f}",
        f"{mean(kls) - floor:.5f}",
        f"{mean(run['top1_agreement'] for run in runs):.4f}",
    ]


if __name__ == "__main__":
    main()
