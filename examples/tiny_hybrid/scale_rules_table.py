"""Prints a Markdown table of the results of compare_scale_rules.sh: one row for each start and scale rule."""

import argparse
import json
from pathlib import Path
from statistics import mean

from megatron_qad.report.runs import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="output directory of compare_scale_rules.sh")
    parser.add_argument("arms", nargs="+", help="RULE:UPDATE of each row")
    options = parser.parse_args()
    print("| start | scales | seeds | PTQ: KL | QAD: KL | of PTQ | noise floor | QAD beyond it | top-1 |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for start in ("plain", "smoothed"):
        for arm in options.arms:
            if cells := row(options.output, f"{start}-{arm.replace(':', '-')}"):
                print(f"| {start} | {arm.replace(':', ', ')} | {' | '.join(cells)} |")


def row(output: Path, name: str) -> list[str]:
    """Return the cells of one arm, means over its seeds with the smallest and largest KL; none if it has no result."""
    seeds = sorted(path.parent for path in output.glob(f"{name}-[0-9]*/noise.json"))
    if not seeds:
        return []
    ptq = Run.read("PTQ", output / f"{name}-ptq").validation["kl_to_teacher"]
    runs = [Run.read(path.name, path).validation for path in seeds]
    kls = [run["kl_to_teacher"] for run in runs]
    floor = mean(json.loads((path / "noise.json").read_text())["floor"] for path in seeds)
    return [
        str(len(seeds)),
        f"{ptq:.5f}",
        f"{mean(kls):.5f} ({min(kls):.5f} to {max(kls):.5f})",
        f"{mean(kls) / ptq:.2f}",
        f"{floor:.5f}",
        f"{mean(kls) - floor:.5f}",
        f"{mean(run['top1_agreement'] for run in runs):.4f}",
    ]


if __name__ == "__main__":
    main()
