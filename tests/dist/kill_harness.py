"""Kills a job at random moments and restarts it until it is done; checks every restart and the final weights.

    python tests/dist/kill_harness.py --kills 30 --record docs/kill_test.md        (make test-kill)

A kill is a SIGKILL to all ranks or to one, at a random time after the start, or shortly after a checkpoint's partial
directory appears: saves are short and would rarely be hit otherwise. Exports are killed in the same way. After each
kill the run directory is checked, and the next start must resume at the checkpoint that it names.
"""

import argparse
import datetime
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import tiny_job
from fork_server import ForkServer
from launch import ROOT

TRACKER = "latest_checkpointed_iteration.txt"
NUM_STEPS, SAVE_INTERVAL = 12, 2


@dataclass
class Kill:
    """One kill: its target and moment, and the steps that were done and saved."""

    what: str
    """The killed job or export."""
    moment: str
    """Time of the kill."""
    reached: int
    """The last step that the log reports as done."""
    complete: int
    """The checkpoint that the next start loads."""


@dataclass
class Harness:
    directory: Path
    server: ForkServer
    seed: int
    kills: list[Kill] = field(default_factory=list)

    def __post_init__(self):
        self.draw = random.Random(self.seed)
        d = self.directory
        tiny_job.write_hf(d / "hf", tiny_job.LLAMA | {"dtype": "bfloat16"})
        tiny_job.write_hf(d / "hf_student", tiny_job.LLAMA | {"dtype": "bfloat16"}, noise=0.3)
        tiny_job.write_data(d / "data", vocab_size=tiny_job.LLAMA["vocab_size"])
        models = [(f"{d}/hf", f"{d}/teacher", "bfloat16"), (f"{d}/hf_student", f"{d}/student", "bfloat16")]
        self.server.run("training_jobs:import_checkpoints", 1, {"models": models})
        start = time.monotonic()
        self.train("through", [])
        self.seconds = time.monotonic() - start
        self.expected = self.digest("through")

    def train(self, run: str, flags: list[str], kill: dict | None = None) -> str:
        d = self.directory
        argv = [
            *("--qad-teacher", f"{d}/teacher", "--qad-student", f"{d}/student", "--save", f"{d}/{run}"),
            *("--data-path", f"{d}/data", "--data-cache-path", f"{d}/cache", "--split", "80,20,0", "--bf16"),
            *("--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "8", "--log-interval", "1"),
            *("--train-iters", str(NUM_STEPS), "--lr", "1e-3", "--min-lr", "1e-4", "--lr-decay-style", "cosine"),
            *("--eval-interval", "4", "--eval-iters", "1", "--qad-calibration-samples", "8"),
            *("--use-distributed-optimizer", "--save-interval", str(SAVE_INTERVAL), "--qad-keep-last", "2"),
            *("--qad-verbose", *flags),  # Megatron says when training is done,
        ]
        argv += ["--load", f"{d}/{run}"] if (d / run / TRACKER).is_file() else []
        return self.server.run("training_jobs:train", 2, {"argv": argv}, kill=kill, fails=None if kill else False)

    def digest(self, run: str) -> str:
        output = self.server.run(
            "surviving_jobs:digest", 1, {"directory": f"{self.directory}/{run}/iter_{NUM_STEPS:07d}"}
        )
        return next(line for line in output.splitlines() if line.startswith("digest "))

    def one_run(self, name: str, num_kills: int) -> None:
        """Run a job from scratch, kill it up to ``num_kills`` times, then let it finish; half of the runs save
        asynchronously. The final tensors must equal those of the uninterrupted run, bit for bit."""
        flags = ["--async-save"] if self.draw.random() < 0.5 else []
        root, complete = self.directory / name, 0
        for _ in range(num_kills):
            if complete == NUM_STEPS:
                break
            in_a_save = self.draw.random() < 0.5
            kill = {"after": self.draw.uniform(0, 0.2 if in_a_save else self.seconds)}
            if in_a_save:
                kill["when"] = f"{root}/iter_{self._draw_save_after(complete):07d}.*.partial"
            if self.draw.random() < 0.3:
                kill["victim"] = self.draw.randrange(2)
            output = self.train(name, flags, kill)
            self._check_resumes_after(output, complete)
            reached = max((step for step, _ in _iterations(output)), default=complete)
            if "after training is done" in output:
                continue  # the job ended before the kill
            complete = self._read_complete(root)
            assert 0 <= reached - complete <= SAVE_INTERVAL + len(flags) * SAVE_INTERVAL, (reached, complete)
            victim = f"rank {kill['victim']}" if "victim" in kill else "all ranks"
            kind = f"{victim}, {'asynchronous' if flags else 'synchronous'} saves"
            when = f"{kill['after']:.3f} s after the start" + (" of a save" if in_a_save else "")
            self.kills.append(Kill(kind, when, reached, complete))
        output = self.train(name, flags)
        self._check_resumes_after(output, complete)
        assert self.digest(name) == self.expected, f"{name} ended with other weights"
        assert not list(root.glob("*.partial")) and not list(root.glob("*.replaced"))

    def _draw_save_after(self, complete: int) -> int:
        return self.draw.randrange(complete + SAVE_INTERVAL, NUM_STEPS + 1, SAVE_INTERVAL)

    def _check_resumes_after(self, output: str, complete: int) -> None:
        """Check that the first step follows the existing checkpoint; a start that was killed earlier has no step."""
        steps = _iterations(output)
        assert not steps or steps[0][0] == complete + 1, (
            f"started at {steps[0][0]}, not after {complete}\n{output[-4000:]}"
        )

    def _read_complete(self, root: Path) -> int:
        """Return the checkpoint that the tracker names, which must be valid; the newest valid one if the tracker is
        truncated; 0 if there is no tracker yet."""
        from megatron_qad.engine.run_directory import manifest

        if not (root / TRACKER).is_file():
            return 0
        tracked = (root / TRACKER).read_text()
        valid = [int(path.name[5:]) for path in root.glob("iter_???????") if not manifest.find_problems(path)]
        if tracked.isdigit():
            assert int(tracked) in valid, f"the tracker names {tracked}; valid checkpoints: {valid}"
            return int(tracked)
        return max(valid)

    def exports(self, num_kills: int) -> None:
        """Kill exports of the uninterrupted run: the target is complete or missing, and the next export succeeds."""
        target = self.directory / "exported"
        arguments = {"checkpoint": f"{self.directory}/through", "outputs": {"modelopt": str(target)}}
        start = time.monotonic()
        self.server.run("training_jobs:export_checkpoint", 1, arguments)
        seconds = time.monotonic() - start
        expected = (target / "model.safetensors").read_bytes()
        for number in range(3 * num_kills):
            if sum(kill.what == "export" for kill in self.kills) == num_kills:
                break
            output = self.directory / f"exported{number}"
            arguments["outputs"] = {"modelopt": str(output)}
            after = self.draw.uniform(0, seconds)
            self.server.run("training_jobs:export_checkpoint", 1, arguments, kill={"after": after}, fails=None)
            there = output.exists()
            if not there:
                self.server.run("training_jobs:export_checkpoint", 1, arguments)
            assert (output / "model.safetensors").read_bytes() == expected
            assert {file.name for file in output.iterdir()} == {file.name for file in target.iterdir()}
            if not there:  # else it was done before its moment came
                self.kills.append(Kill("export", f"{after:.3f} s after the start", 0, 0))


def _iterations(output: str) -> list[tuple[int, int]]:
    """Return the completed steps in the log, in order."""
    return [(int(a), int(b)) for a, b in re.findall(r"\| iteration (\d+)/(\d+) \|", output)]


def record(harness: Harness, file: Path, seconds: float) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lost = [kill.reached - kill.complete for kill in harness.kills if kill.what != "export"]
    lines = [
        "# Kill test",
        f"`make test-kill`, {datetime.date.today()}, commit {commit.strip()}, seed {harness.seed}: "
        f"{len(harness.kills)} kills with SIGKILL in {seconds:.0f} s on two CPU cores. The job trains the tests' tiny "
        f"Llama on two data-parallel ranks in BF16 with the distributed optimizer: {NUM_STEPS} steps, a checkpoint "
        f"every {SAVE_INTERVAL} steps, the last two kept.",
        "",
        "Every start resumed from the checkpoint that the tracker named, and that checkpoint was valid. Every run "
        "ended with the weights, masters and moments of an undisturbed run, bit for bit. A killed job lost at most "
        f"{max(lost)} steps, {sum(lost) / len(lost):.1f} on average. A killed export continues after its finished "
        "shards.",
        "",
        'Kills named "asynchronous saves" ran with `--async-save`, which megatron-core 0.19.2 turns off here: they '
        "were synchronous saves ([limitations](limitations.md)).",
        "",
        "| kill | killed | time | steps done | resumed after step | steps lost |",
        "|---|---|---|---|---|---|",
    ]
    for number, kill in enumerate(harness.kills, 1):
        steps = f"{kill.reached} | {kill.complete} | {kill.reached - kill.complete}"
        lines.append(
            f"| {number} | {kill.what} | {kill.moment} | {steps if 'export' not in kill.what else '- | - | -'} |"
        )
    file.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory, ForkServer(Path(directory)) as server:
        harness = Harness(Path(directory), server, options.seed)
        harness.exports(options.kills // 6)
        num_runs = 0
        while len(harness.kills) < options.kills:
            num_runs += 1
            harness.one_run(f"run{num_runs}", min(5, options.kills - len(harness.kills)))
            print(f"{len(harness.kills)} kills survived in {time.monotonic() - start:.0f} s", flush=True)
        for kill in harness.kills:
            print(kill)
        if options.record:
            record(harness, options.record, time.monotonic() - start)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
