"""Starts ``vllm serve`` on a free port of this machine."""

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "qad-student"
"""The model's name on the server."""


@contextmanager
def server_of(python: Path, env: dict, model: Path, log: Path) -> Iterator[int]:
    """Run ``vllm serve`` while the block runs; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", model, "--served-model-name", NAME, "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    command += ["--max-logprobs", "-1", "--max-num-seqs", "4"]
    with open(log, "w") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, env=env, cwd=log.parent)
    try:
        _wait_for(port, process, log)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 1500  # the start takes 60 s of CPU, and twenty times as long if it gets little of one
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"vllm serve did not start:\n{log.read_text()[-6000:]}")
