"""Damages inputs of every kind and counts what a user sees: an error, the right result, another result, a traceback.

    python tests/dist/fuzz_harness.py --record docs/fuzz_test.md        (make test-fuzz)

The inputs are a model with its tokenizer, its configuration, chats, prepared data, and Megatron's index cache. A model
is imported and exported, chats are prepared, and data and caches are used by a job of four steps. An outcome is
"silent" if the program succeeds with another output than from undamaged inputs. There must be no silent outcome and no
traceback.
"""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fork_server import ForkServer
from fuzz_inputs import Damage, grid
from launch import ROOT
from tiny_job import READ_HERE

OUTCOMES = ("error", "same", "silent", "traceback")
FLAGS = (
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-3 --min-lr 1e-4 "
    "--split 80,20,0 --eval-interval 4 --eval-iters 1 --log-interval 1 --qad-calibration-samples 8 --bf16"
).split()


@dataclass
class Outcome:
    """What one damage led to."""

    damage: Damage
    outcome: str
    """One of ``OUTCOMES``."""
    message: str
    """The error, or the end of the output."""


class Fuzz:
    """The pristine inputs in a directory, and the fork server that reads damaged copies."""

    def __init__(self, directory: Path, server: ForkServer):
        self.directory, self.server = directory, server
        server.run("fuzz_jobs:make_inputs", 1, {"directory": str(directory)})
        # Jobs use data and cache in one place, because the names of cache files depend on the data's path.
        self.work = {name: directory / "work" / name for name in ("data", "cache")}
        shutil.copytree(directory / "data", self.work["data"])
        self.expected = self._train()
        assert self.expected[0] == "result", self.expected
        shutil.copytree(self.work["cache"], directory / "cache")
        self.data_files = sorted(file.name for file in (directory / "data").iterdir())
        cache = directory / "cache"
        self.cache_files = sorted(str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file())
        self.damages = grid(self.data_files, self.cache_files)

    def run(self, numbers: list[int]) -> list[Outcome]:
        """Apply the damages with these numbers, each to a fresh copy of its input."""
        in_process = [n for n in numbers if self.damages[n].input in ("model", "config", "chats")]
        outcomes = self._read(in_process) if in_process else []
        outcomes += [self._job(self.damages[n]) for n in numbers if n not in in_process]
        return sorted(outcomes, key=lambda outcome: self.damages.index(outcome.damage))

    def _read(self, numbers: list[int]) -> list[Outcome]:
        arguments = {"directory": str(self.directory), "numbers": numbers}
        arguments |= {"data_files": self.data_files, "cache_files": self.cache_files}
        output = self.server.run("fuzz_jobs:read_models_and_chats", 1, arguments, timeout=60 + 5 * len(numbers))
        rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"number"')]
        assert [row["number"] for row in rows] == numbers, output[-6000:]
        return [Outcome(self.damages[row["number"]], row["outcome"], row["message"]) for row in rows]

    def _job(self, damage: Damage) -> Outcome:
        """Run a job on a copy of data and cache, one of which is damaged."""
        shutil.rmtree(self.directory / "work")
        for name, copy in self.work.items():
            shutil.copytree(self.directory / name, copy)
        damage.apply(self.work[damage.input])
        kind, found = self._train()
        if kind == "result":
            kind = "same" if found == self.expected[1] else "silent"
        return Outcome(damage, kind, found)

    def _train(self) -> tuple[str, str]:
        """Train and validate; return ("result", the losses), or what a user sees instead."""
        models = ["--qad-teacher", str(self.directory / "teacher"), "--seed", "1"]
        data = ["--data-path", f"{self.work['data']}/data", "--data-cache-path", str(self.work["cache"])]
        argv = [*models, *data, *READ_HERE, *FLAGS]
        output = self.server.run("training_jobs:train", 1, {"argv": argv}, fails=None)
        if "Traceback" in output:
            return "traceback", output[-3000:]
        if errors := [line for line in output.splitlines() if line.startswith("error: ")]:
            return "error", errors[0].removeprefix("error: ")
        losses = re.findall(r"\| (iteration \d+/\d+ .*?) \| [\d,]+ tokens/s", output)
        validations = re.findall(r"validation at iteration (\d+.*)", output)
        return ("result", repr((losses, validations))) if losses and validations else ("traceback", output[-3000:])


def table(outcomes: list[Outcome]) -> list[str]:
    """Return a Markdown table: one row per input, with the number of each outcome."""
    lines = ["| input | damages | " + " | ".join(OUTCOMES) + " |", "|---" * (2 + len(OUTCOMES)) + "|"]
    for name in dict.fromkeys(outcome.damage.input for outcome in outcomes):
        counts = Counter(outcome.outcome for outcome in outcomes if outcome.damage.input == name)
        lines.append(f"| {name} | {counts.total()} | " + " | ".join(str(counts[kind]) for kind in OUTCOMES) + " |")
    return lines


def record(outcomes: list[Outcome], file: Path, seconds: float) -> None:
    """Write the page of the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    kinds: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        kinds.setdefault((outcome.damage.input, outcome.damage.file), []).append(
            f"{outcome.damage.kind}: {outcome.outcome}"
        )
    lines = [
        "# Fuzz test",
        f"`make test-fuzz`, {datetime.date.today()}, commit {commit.strip()}: {len(outcomes)} damages in {seconds:.0f} "
        "s on two CPU cores, from a fixed grid of files and kinds of damage.",
        "",
        "- **error**: one line that names the file, and exit status 1.",
        "- **same**: success, with the same output as from undamaged input.",
        "- **silent**: success with another output. **traceback**: any other exception.",
        "",
        *table(outcomes),
        "",
        "| input | file or key | outcomes |",
        "|---|---|---|",
        *(f"| {name} | `{file}` | {'; '.join(found)} |" for (name, file), found in kinds.items()),
    ]
    file.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("model", "config", "chats", "data", "cache"), help="damage one input only")
    parser.add_argument("--record", type=Path, help="Markdown file to write")
    parser.add_argument("--verbose", action="store_true", help="print every outcome with its message")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, ForkServer(Path(directory)) as server:
        fuzz = Fuzz(Path(directory), server)
        numbers = [n for n, damage in enumerate(fuzz.damages) if options.only in (None, damage.input)]
        outcomes = fuzz.run(numbers)
    bad = [outcome for outcome in outcomes if outcome.outcome in ("silent", "traceback")]
    for outcome in outcomes if options.verbose else bad:
        print(f"{outcome.outcome.upper()} {outcome.damage}: {outcome.message[-600:]}")
    print("\n".join(table(outcomes)))
    if options.record:
        record(outcomes, options.record, time.monotonic() - start)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
