"""Runs many short commands of megatron-qad in forks of one process that has imported torch and Megatron once.

    python jobs.py OUTPUT PHASE [PHASE ...]

The imports take longer than the steps of these jobs. A phase is the name of a file in OUTPUT/jobs, or several names
joined by commas, which run in parallel; phases run one after the other. Each line of a file is ``NAME COMMAND FLAGS``,
quoted as for a shell, and each also works alone: ``megatron-qad COMMAND FLAGS``. Output goes to OUTPUT/log/NAME.txt.
"""

import argparse
import gc
import os
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch  # noqa: E402

import pretrain_qad  # noqa: E402, F401
from megatron_qad.cli.main import main as megatron_qad  # noqa: E402

SHOWN = 40
"""Lines of the log that are printed if a command fails."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("phases", nargs="+", metavar="PHASE")
    options = parser.parse_args()
    (options.output / "log").mkdir(exist_ok=True)
    gc.freeze()  # a collection in a fork would copy the pages of all imported objects
    started = time.monotonic()
    for phase in options.phases:
        files = [options.output / "jobs" / name for name in phase.split(",")]
        chains = [[shlex.split(line) for line in file.read_text().splitlines()] for file in files]
        run_phase(chains, options.output / "log", started)


def run_phase(chains: list[list[list[str]]], logs: Path, started: float) -> None:
    """Run lists of commands in parallel, and the commands of each list one after the other. Exits if one fails."""
    running: dict[int, tuple[str, list[list[str]]]] = {}

    def start(chain: list[list[str]]) -> None:
        if chain:
            (name, *words), *rest = chain
            print(f"[{time.monotonic() - started:3.0f} s] {name}: megatron-qad {words[0]}", flush=True)
            running[fork(words, logs / f"{name}.txt")] = name, rest

    for chain in chains:
        start(chain)
    while running:
        process, status = os.wait()
        name, rest = running.pop(process)
        text = (logs / f"{name}.txt").read_text()
        if status:
            print("\n".join(text.splitlines()[-SHOWN:]))
            sys.exit(f"error: {name} failed; complete log: {logs / name}.txt")
        for line in text.splitlines():
            if "megatron_qad validation" in line:
                print(f"        {name}: {line.strip()}", flush=True)
        start(rest)


def fork(words: list[str], log: Path) -> int:
    """Start a command as the only rank of a job, and return its process id."""
    # The store is served here, as in torchrun's agent, so its port is open before the rank connects.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if process := os.fork():
        _stores.append(store)
        return process
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)
    code = 1
    try:
        megatron_qad(words)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_stores: list[torch.distributed.TCPStore] = []
"""Kept, because a store ends with its object."""


if __name__ == "__main__":
    main()
