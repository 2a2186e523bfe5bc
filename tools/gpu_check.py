"""Run the checks that need a GPU within eight minutes and print one Markdown table. ``make gpu-check`` runs it.

    python tools/gpu_check.py [--device cuda|cpu] [--tiny] [--only NAME ...] [--seconds 480]

The checks compare kernels with their references, a copy's rate and modelopt; they measure the fused output layer; they
compare a training step with modelopt's distillation and its memory with the dry run, and grouped with looped experts.
Without a GPU, they run in plain PyTorch with tiny sizes. Each check (gpu_check_*.py) runs in its own process with its
own time limit. A check that raises, breaks its CUDA context or hangs becomes a failed row, and the others still run.
The exit status is 1 if a row has the verdict "fail".
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple
from pathlib import Path

import psutil  # also a dependency of accelerate
from gpu_check_experts import experts
from gpu_check_losses import fused_output_layer, kl, kl_compiled
from gpu_check_nvfp4 import nvfp4
from gpu_check_step import training_step
from gpu_check_vision import vision_encoder
from gpu_rows import Check, Machine, Row, one_line

ROOT = Path(__file__).resolve().parents[1]
CHECKS = (
    Check("NVFP4", 115, nvfp4),
    Check("KL", 65, kl),
    Check("fused output layer", 50, fused_output_layer),
    Check("training step", 170, training_step),
    Check("KL, torch.compile", 45, kl_compiled),
    Check("experts", 15, experts),
    Check("vision encoder", 20, vision_encoder),
)
"""The checks, in the order of the table. Each is a function that yields rows. Without a GPU, sizes are tiny, PyTorch
replaces the kernels, rows that need a kernel say so, and no speed is judged. All time limits together are <= 480 s."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(check.name for check in CHECKS)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if nvidia-smi finds a GPU")
    parser.add_argument("--tiny", action="store_true", help="use tiny sizes and judge no speed; always on for a CPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="checks to run: " + names)
    parser.add_argument("--seconds", type=float, default=480, help="time limit; checks that no longer fit are skipped")
    parser.add_argument("--commit", help="commit for the header, if the tree has no .git")
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)  # runs the check of --only in this process
    options = parser.parse_args()
    checks = CHECKS
    if options.only:
        checks = [check for check in CHECKS if check.name in options.only]
        if unknown := set(options.only) - {check.name for check in CHECKS}:
            parser.error(f"--only: unknown check {', '.join(sorted(unknown))}. Choose from {names}.")
    if options.rows_to:
        return write_rows(checks[0], Machine(options.device, options.tiny), options.rows_to)
    start, gpu = time.monotonic(), nvidia_smi()
    device = options.device or ("cuda" if gpu else "cpu")
    machine = Machine(device, options.tiny or device == "cpu")
    print(header(machine, gpu, options.commit), flush=True)
    rows = table_rows(checks, machine, start + options.seconds)
    print("| what; peer | size | ours | peer | ratio | goal | verdict |\n|" + "---|" * 7)
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in astuple(row)) + " |")
    sys.exit(any(row.verdict == "fail" for row in rows))


def header(machine: Machine, gpu: tuple[str, str] | None, commit: str | None) -> str:
    def version(package: str) -> str:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} not installed"

    if commit is None:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        commit = command_output(git) or "unknown (no git repository; pass --commit)"
    where = "no GPU, PyTorch on the CPU"
    if machine.device == "cuda":
        where = "{}, driver {}".format(*gpu) if gpu else "a GPU that nvidia-smi does not list"
    packages = ", ".join(map(version, ("torch", "triton", "nvidia-modelopt", "megatron-core")))
    sizes = "; tiny sizes, speeds are meaningless" if machine.is_tiny else ""
    return f"{where}; {packages}; commit {commit}; {datetime.date.today()}{sizes}\n"


def nvidia_smi() -> tuple[str, str] | None:
    """Return the name and driver version of the first GPU, or None."""
    output = command_output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    name, _, driver = output.partition("\n")[0].partition(", ")
    return (name, driver) if driver else None


def command_output(command: list[str]) -> str:
    """Return the output of a command; empty if the program is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def table_rows(checks: list[Check], machine: Machine, deadline: float) -> list[Row]:
    """Return the rows of all checks. They run one after the other, or in parallel if no speed is judged."""
    with ThreadPoolExecutor(len(checks) if machine.is_tiny else 1) as pool:
        results = pool.map(lambda check: run_check(check, machine, deadline), checks)
        return [row for rows in results for row in rows]


def run_check(check: Check, machine: Machine, deadline: float) -> list[Row]:
    """Run a check in its own process and return its rows, plus a failed row if the process failed.

    The output of a failed process goes to stderr.
    """
    seconds = deadline - time.monotonic()
    if seconds < check.seconds:
        return [Row(check.name, "-", "skipped: no time left")]
    if machine.device == "cuda":  # parallel checks on a CPU may take longer
        seconds = check.seconds
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if machine.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as directory:
        row_file, output = Path(directory, "rows"), Path(directory, "output")
        row_file.touch()
        command = [
            sys.executable,
            __file__,
            "--device",
            machine.device,
            "--only",
            check.name,
            "--rows-to",
            str(row_file),
        ]
        command += ["--tiny"] if machine.is_tiny else []
        failure = None
        with output.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
            try:
                if status := process.wait(seconds):
                    failure = f"its process exited with status {status}"
            except subprocess.TimeoutExpired:
                end(process)
                failure = f"not finished after {seconds:.0f} s"
        rows = [Row(**json.loads(line)) for line in row_file.read_text().splitlines()]
        if failure:
            print(f"{check.name}: {failure}\n{output.read_text()[-6000:]}", file=sys.stderr, flush=True)
            if not rows or rows[-1].what != check.name:  # it ended before it could write its failed row
                rows.append(failed(check, failure))
        return rows


def end(process: subprocess.Popen) -> None:
    """Kill a process and all its descendants: torchrun's ranks run in their own sessions."""
    parent = psutil.Process(process.pid)
    for member in [parent, *parent.children(recursive=True)]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def failed(check: Check, reason: str) -> Row:
    return Row(check.name, "-", f"failed: {reason}", verdict="fail")


def write_rows(check: Check, machine: Machine, path: Path) -> None:
    """Run a check and write each row as a line of JSON at once, so that rows survive a later failure."""
    with path.open("w", buffering=1) as file:
        try:
            if machine.device == "cuda":
                import torch

                torch.cuda.current_device()  # raises with the reason if there is no GPU
            for row in check.rows(machine):
                file.write(json.dumps(asdict(row)) + "\n")
        except (Exception, SystemExit) as error:  # any error becomes a row of the table
            traceback.print_exc()
            file.write(json.dumps(asdict(failed(check, one_line(error)))) + "\n")
            sys.exit(1)


if __name__ == "__main__":
    main()
