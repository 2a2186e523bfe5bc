"""Changes good exports in ways that servers do not notice, and counts what the validator finds.

    python tests/dist/mutation_harness.py --record docs/mutation_test.md        (make test-mutations)

The exports are those of two QAD jobs, a Llama with an FP8 KV cache and a Qwen3-MoE, in both layouts. Each mutation is
applied to a copy and validated with the sums of files, and without them but with --against.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tiny_hybrids
import tiny_job
import torch
from fork_server import ForkServer
from launch import ROOT
from mutations import MUTATIONS, Export, Mutation
from tiny_models import tokenizer

LAYOUTS = ("modelopt", "compressed-tensors")
CONFIGS = {
    "llama": tiny_job.LLAMA | {"dtype": "bfloat16", "hidden_act": "silu", "eos_token_id": 2},
    "qwen3_moe": tiny_hybrids.QWEN3_MOE | {"torch_dtype": "bfloat16", "hidden_act": "silu", "eos_token_id": 2},
}
FLAGS = (
    "--bf16 --split 80,20,0 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-3 "
    "--min-lr 1e-4 --eval-interval 1000 --eval-iters 1 --log-interval 1 --qad-calibration-samples 16"
).split()
CHECKS = ("sums", "against", "neither")


@dataclass(frozen=True)
class Outcome:
    """What the validator found in one changed export."""

    model: str
    layout: str
    mutation: Mutation
    issues: dict[str, list[str]]
    """Check -> issues: with the sums; without them and with --against; with neither."""

    @property
    def is_expected(self) -> bool:
        found = {check: bool(issues) for check, issues in self.issues.items()}
        is_seen = {"against": found["against"], "calibration": found["neither"], "sums": not found["against"]}
        return found["sums"] and is_seen[self.mutation.seen_by]


class Mutations:
    """Good exports in a directory, with the models that their training began from."""

    def __init__(self, directory: Path, server: ForkServer):
        self.directory = directory
        from megatron_qad.data.tokenizer import load_tokenizer

        models = []
        for name, config in CONFIGS.items():
            hf = tiny_job.write_hf(directory / name / "hf", config, dtype=torch.bfloat16)
            tokenizer(config["vocab_size"]).save_pretrained(hf)
            (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "max_length": 77}))
            sizes = {"vocab_size": config["vocab_size"], "tokenizer": load_tokenizer(hf)}
            tiny_job.write_data(directory / name / "data", **sizes)
            models.append([str(hf), str(directory / name / "teacher"), "bfloat16"])
        server.run("training_jobs:import_checkpoints", 1, {"models": models}, timeout=600)
        for name in CONFIGS:
            run = directory / name
            paths = ["--qad-teacher", run / "teacher", "--data-path", run / "data", "--save", run / "run"]
            kv_cache = ["--qad-policy-override", "kv_cache=fp8"] if name == "llama" else []
            argv = [*map(str, paths), *tiny_job.READ_HERE, *FLAGS, *kv_cache]
            server.run("training_jobs:train", 1, {"argv": argv}, timeout=600)
            outputs = {layout: str(run / layout) for layout in LAYOUTS}
            arguments = {"checkpoint": str(run / "run"), "outputs": outputs}
            server.run("training_jobs:export_checkpoint", 1, arguments, timeout=600)

    def validate(self, export: Path, model: str) -> dict[str, list[str]]:
        """Return the issues that each check finds."""
        from megatron_qad.checkpoint.validate import validate_nvfp4

        hf = self.directory / model / "hf"
        arguments = {"sums": {}, "against": {"with_sums": False, "against": hf}, "neither": {"with_sums": False}}
        return {check: [str(i) for i in validate_nvfp4(export, **arguments[check]).issues] for check in CHECKS}

    def run(self, model: str, layout: str, mutation: Mutation) -> Outcome:
        """Apply a mutation to a copy of an export and validate it."""
        copy = self.directory / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.directory / model / layout, copy)
        mutation.change(Export(copy, layout, self.directory / model / "hf"))
        return Outcome(model, layout, mutation, self.validate(copy, model))


def cases() -> list[tuple[str, str, Mutation]]:
    """Return every (model, layout, mutation)."""
    return [(model, layout, m) for model in CONFIGS for layout in LAYOUTS for m in MUTATIONS if model in m.models]


def record(outcomes: list[Outcome], file: Path, seconds: float) -> None:
    """Write the page of the results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    found = {check: sum(bool(o.issues[check]) for o in outcomes) for check in CHECKS}
    lines = [
        "# Mutation test of the validator",
        f"`make test-mutations`, {datetime.date.today()}, commit {commit.strip()}: {len(MUTATIONS)} mutations of "
        f"exports of a Llama and a Qwen3-MoE, in both layouts, {len(outcomes)} in total, in {seconds:.0f} s on two CPU "
        "cores. The unchanged exports have no issue.",
        "",
        "Servers load almost all of them without an error, and compute other logits. Each column is a run of",
        "`tools/validate_nvfp4.py`: with the sums of files, without them (`--no-sums`) but with `--against`, and with",
        "neither. A cell is the number of exports in which it found an issue.",
        "",
        "| found | sums | `--against` | neither |",
        "|---|---:|---:|---:|",
        "| of " + " | ".join([str(len(outcomes)), *(str(found[check]) for check in CHECKS)]) + " |",
        "",
        "| mutation | exports | sums | `--against` | neither | issue with `--against` |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for mutation in MUTATIONS:
        of_this = [o for o in outcomes if o.mutation is mutation]
        counts = " | ".join(str(sum(bool(o.issues[check]) for o in of_this)) for check in CHECKS)
        issue = next((i for o in of_this for i in o.issues["against"]), "none")
        issue = issue.split(", compared with")[0].replace("|", "\\|")
        lines.append(f"| {mutation.name} | {len(of_this)} | {counts} | {_shortened(issue)} |")
    file.write_text("\n".join(lines) + "\n")


def _shortened(issue: str) -> str:
    """Return an issue without the directory of this test."""
    words = ["the model" if word.startswith(tempfile.gettempdir()) else word for word in issue.split(" ")]
    return " ".join(words)[:160]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="Markdown file to write")
    parser.add_argument("--verbose", action="store_true", help="print every outcome with its issues")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, ForkServer(Path(directory)) as server:
        mutations = Mutations(Path(directory), server)
        good = {(m, x): mutations.validate(mutations.directory / m / x, m) for m in CONFIGS for x in LAYOUTS}
        outcomes = [mutations.run(*case) for case in cases()]
    bad = [outcome for outcome in outcomes if not outcome.is_expected]
    for outcome in outcomes if options.verbose else bad:
        print(f"{outcome.model} {outcome.layout} {outcome.mutation.name}: {outcome.issues}")
    false_alarms = [f"{case}: {issues}" for case, issues in good.items() if any(issues.values())]
    print(f"{len(outcomes)} mutations, {len(bad)} of them not as expected; false alarms: {false_alarms or 'none'}")
    if options.record:
        record(outcomes, options.record, time.monotonic() - start)
    return 1 if bad or false_alarms else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
