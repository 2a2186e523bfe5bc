"""What only a GPU can show, as one Markdown table, within eight minutes; ``make gpu-check`` runs it.

    python tools/gpu_check.py [--device cuda|cpu] [--tiny] [--only NAME ...] [--seconds 480]

Kernels against their references and beside a copy's rate and modelopt's; the fused output layer; a training step beside
modelopt's distillation, its memory beside the dry run's. Without a GPU the same in torch, with tiny sizes. Each check
(gpu_check_*.py) runs in a process of its own, with seconds of its own: one that raises, breaks its CUDA context or
hangs is a failed row, and the others still run. The exit status is 1 if a row says "fail".
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

import psutil  # accelerate depends on it, too
from gpu_check_losses import fused_output_layer, kl, kl_compiled
from gpu_check_nvfp4 import nvfp4
from gpu_check_step import training_step
from gpu_rows import Check, Machine, Row, one_line

ROOT = Path(__file__).resolve().parents[1]
CHECKS = (
    Check("NVFP4", 115, nvfp4),
    Check("KL", 65, kl),
    Check("fused output layer", 50, fused_output_layer),
    Check("training step", 190, training_step),
    Check("KL, torch.compile", 45, kl_compiled),
)
"""A check is a function that yields rows. On a machine without a GPU its sizes are tiny and the arithmetic is torch's;
what only a kernel can show says so there, and no speed is judged. All seconds together are at most 480."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where nvidia-smi finds a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, no speed judged; always so on a CPU")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(check.name for check in CHECKS))
    parser.add_argument("--seconds", type=float, default=480, help="a check that no longer fits is left out")
    parser.add_argument("--commit", help="for the header, where the tree has no .git")
    parser.add_argument("--rows-to", type=Path, help=argparse.SUPPRESS)  # this is the process of --only's check
    options = parser.parse_args()
    checks = CHECKS
    if options.only:
        checks = [check for check in CHECKS if check.name in options.only]
        if unknown := set(options.only) - {check.name for check in CHECKS}:
            parser.error(f"--only: no check is called {', '.join(sorted(unknown))}")
    if options.rows_to:
        return write_rows(checks[0], Machine(options.device, options.tiny), options.rows_to)
    began, gpu = time.monotonic(), nvidia_smi()
    device = options.device or ("cuda" if gpu else "cpu")
    machine = Machine(device, options.tiny or device == "cpu")
    print(header(machine, gpu, options.commit), flush=True)
    rows = table_rows(checks, machine, began + options.seconds)
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
        commit = output_of(git) or "unknown (no git here; give --commit)"
    where = "no GPU, torch on the CPU"
    if machine.device == "cuda":
        where = "{}, driver {}".format(*gpu) if gpu else "a GPU of which nvidia-smi says nothing"
    packages = ", ".join(map(version, ("torch", "triton", "nvidia-modelopt", "megatron-core")))
    sizes = "; tiny sizes, no speed means anything" if machine.is_tiny else ""
    return f"{where}; {packages}; commit {commit}; {datetime.date.today()}{sizes}\n"


def nvidia_smi() -> tuple[str, str] | None:
    """Name and driver of the first GPU, or None."""
    found = output_of(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    name, _, driver = found.partition("\n")[0].partition(", ")
    return (name, driver) if driver else None


def output_of(command: list[str]) -> str:
    """Empty where there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def table_rows(checks: list[Check], machine: Machine, deadline: float) -> list[Row]:
    """Of all checks, one after the other; where no speed is judged, all at once."""
    with ThreadPoolExecutor(len(checks) if machine.is_tiny else 1) as pool:
        found = pool.map(lambda check: run_check(check, machine, deadline), checks)
        return [row for rows in found for row in rows]


def run_check(check: Check, machine: Machine, deadline: float) -> list[Row]:
    """The rows that its process wrote, and one more if it failed. What it printed then goes to stderr."""
    seconds = deadline - time.monotonic()
    if seconds < check.seconds:
        return [Row(check.name, "-", "left out: no time")]
    if machine.device == "cuda":  # on a CPU they share its cores
        seconds = check.seconds
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if machine.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as directory:
        rows, printed = Path(directory, "rows"), Path(directory, "printed")
        rows.touch()
        command = [sys.executable, __file__, "--device", machine.device, "--only", check.name, "--rows-to", str(rows)]
        command += ["--tiny"] if machine.is_tiny else []
        failure = None
        with printed.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
            try:
                if status := process.wait(seconds):
                    failure = f"its process ended with status {status}"
            except subprocess.TimeoutExpired:
                end(process)
                failure = f"not done after {seconds:.0f} s"
        found = [Row(**json.loads(line)) for line in rows.read_text().splitlines()]
        if failure:
            print(f"{check.name}: {failure}\n{printed.read_text()[-6000:]}", file=sys.stderr, flush=True)
            if not found or found[-1].what != check.name:  # it did not live to say why
                found.append(failed(check, failure))
        return found


def end(process: subprocess.Popen) -> None:
    """With all that it started: torchrun's ranks are in sessions of their own."""
    parent = psutil.Process(process.pid)
    for one in [parent, *parent.children(recursive=True)]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def failed(check: Check, why: str) -> Row:
    return Row(check.name, "-", f"failed: {why}", verdict="fail")


def write_rows(check: Check, machine: Machine, path: Path) -> None:
    """A line of JSON for each row as soon as it is there: what was measured stays when a later row fails."""
    with path.open("w", buffering=1) as file:
        try:
            if machine.device == "cuda":
                import torch

                torch.cuda.current_device()  # raises, and says why, where there is none
            for row in check.rows(machine):
                file.write(json.dumps(asdict(row)) + "\n")
        except (Exception, SystemExit) as error:  # whatever it was, the table says it
            traceback.print_exc()
            file.write(json.dumps(asdict(failed(check, one_line(error)))) + "\n")
            sys.exit(1)


if __name__ == "__main__":
    main()
