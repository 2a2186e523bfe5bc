"""Starts torchrun for a worker script and returns its results.

A start takes ten seconds or more for imports, so a worker handles many cases in one launch. If torchrun itself does not
matter, ``fork_server.ForkServer.results`` runs the same worker in a second. In the test:

    results = run_workers(Path(__file__).with_name("worker_x.py"), 2, {"model": str(tmp_path)})

In the worker, which runs on every rank (``tests/dist`` is on its path):

    def cases(arguments: dict) -> list[dict]: ...        # any JSON; the test receives rank 0's list

    if __name__ == "__main__":
        report(cases)
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_workers(worker_file: str | Path, nproc: int, arguments: dict | None = None, timeout: float = 300) -> list:
    """Run ``worker_file`` on ``nproc`` ranks of this machine and return rank 0's list, one result for each case.

    Raises:
        AssertionError: the launch failed, exceeded ``timeout`` seconds or wrote no result; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as directory:
        result, given = Path(directory) / "result.json", Path(directory) / "arguments.json"
        given.write_text(json.dumps(arguments or {}))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(nproc)]
        # --standalone: the agent's store chooses a free port, so two tests never use the same one.
        command += ["--standalone", str(worker_file), str(given), str(result)]
        # A temporary file instead of a pipe: a child that outlives a killed agent would keep a pipe open forever.
        with open(Path(directory) / "output.txt", "w+") as output:
            launch = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment())
            try:
                code = launch.wait(timeout)
            except subprocess.TimeoutExpired:
                launch.terminate()  # the agent passes it on to its workers
                code = f"none after {timeout} s; last exit status {launch.wait(30)}"
            output.seek(0)
            text = output.read()
        if code != 0 or not result.is_file():
            raise AssertionError(f"{Path(worker_file).name} on {nproc} ranks: exit status {code}\n{text[-12000:]}")
        return json.loads(result.read_text())


def environment() -> dict[str, str]:
    """Return the environment of a rank: one thread, no compilation, this checkout first on the path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "dist"), os.environ.get("PYTHONPATH", "")])
    fixed = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    return {**os.environ, **fixed}


def report(cases: Callable[[dict], list]) -> None:
    """Main function of a worker: call ``cases`` with the test's arguments on every rank, and return rank 0's list."""
    given, result = sys.argv[1:3]
    _write(cases(json.loads(Path(given).read_text())), result)


def report_of(worker: str, given: dict, result: str) -> None:
    """Main function of a rank of the fork server: ``report`` for the module ``worker``."""
    _write(importlib.import_module(worker).cases(given), result)


def _write(results: list, result: str) -> None:
    if os.environ["RANK"] == "0":
        aside = Path(result + ".part")
        aside.write_text(json.dumps(results))
        aside.rename(result)
