"""Runs many short jobs in forks of one process that has imported torch and Megatron once.

    python jobs.py OUTPUT PHASE [PHASE ...]

The imports take longer than the steps of these jobs. A phase is the name of a file in OUTPUT/jobs, or several names
joined by commas, which run in parallel; phases run one after the other. Each line of a file is ``NAME RANKS ABOUT
COMMAND FLAGS``, quoted as for a shell, and each also works alone: ``megatron-qad COMMAND FLAGS``. Output goes to
OUTPUT/log/NAME.txt. A second call leaves out the jobs that have finished (OUTPUT/log/NAME.done).
"""

import argparse
import gc
import os
import re
import runpy
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

_STARTED = time.monotonic()
sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402

import pretrain_qad  # noqa: E402, F401
from megatron_qad.cli.main import main as megatron_qad  # noqa: E402
from megatron_qad.engine.processes import end_with_parent  # noqa: E402

SHOWN = 40
"""Lines of the log that are printed if a job fails."""
POLL = 0.1
"""Seconds between two looks at the running jobs."""
ITERATION = re.compile(r" \| (iteration [^|]*) \| ([^|]*) \| grad norm.*\| left: (.*)")
VALIDATION = re.compile(r"validation at iteration \d+ \| .*")


@dataclass(frozen=True)
class Job:
    """One command."""

    name: str
    words: tuple[str, ...]
    """A command of ``megatron-qad`` or the path of a Python script, then the arguments."""
    needs: tuple[str, ...] = ()
    """Names of the jobs that must finish first."""
    ranks: int = 1
    about: str = ""
    """What it does; empty: the first of ``words``."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("phases", nargs="+", metavar="PHASE")
    parser.add_argument("--elapsed", type=float, default=0, help="seconds that the example has been running")
    options = parser.parse_args()
    jobs: list[Job] = []
    before: tuple[str, ...] = ()
    for phase in options.phases:
        chains = [(options.output / "jobs" / name).read_text().splitlines() for name in phase.split(",")]
        ends = []
        for chain in chains:
            needs = before
            for name, ranks, about, *words in map(shlex.split, chain):
                jobs.append(Job(name, tuple(words), needs, int(ranks), about))
                needs = (name,)
            ends += needs
        before = tuple(ends)
    run_jobs(jobs, options.output, parallel=len(jobs), elapsed=options.elapsed)


def run_jobs(
    jobs: Sequence[Job],
    output: Path,
    parallel: int,
    on_finish: Callable[[Set[str]], None] = lambda finished: None,
    elapsed: float = 0,
) -> None:
    """Run jobs, each when those it needs have finished and fewer than ``parallel`` are running. Exits if one fails.

    Jobs that are still running are killed when this process ends, whatever the cause.

    Args:
        jobs: the first that is ready starts first.
        output: logs and marks of finished jobs go to its folder ``log``.
        parallel: the most jobs at a time.
        on_finish: called after each job with the names of all that have finished.
        elapsed: seconds before the start of this process, for the times that are printed.
    """
    gc.freeze()  # a collection in a fork would copy the pages of all imported objects
    logs, started = output / "log", _STARTED - elapsed
    logs.mkdir(parents=True, exist_ok=True)
    finished = {job.name for job in jobs if _mark(logs, job).is_file() and _mark(logs, job).read_text() == _text(job)}
    waiting = [job for job in jobs if job.name not in finished]
    running: dict[str, Running] = {}
    while waiting or running:
        ready = [job for job in waiting if finished.issuperset(job.needs)][: parallel - len(running)]
        for job in ready:
            print(
                f"[{time.monotonic() - started:3.0f} s] {job.name}: {job.about or Path(job.words[0]).name}", flush=True
            )
            running[job.name] = Running(job, logs / f"{job.name}.txt")
            waiting.remove(job)
        if not running:
            sys.exit(f"error: {waiting[0].name} waits for a job that is not in the list: {waiting[0].needs}")
        time.sleep(POLL)
        for name, process in list(running.items()):
            has_ended = process.has_ended()
            process.print_progress()
            if has_ended:
                del running[name]
                _mark(logs, process.job).write_text(_text(process.job))
                finished.add(name)
                on_finish(finished)


class Running:
    """A job that has been started: a fork for each rank.

    Args:
        job: to start.
        log: file for its output.
    """

    def __init__(self, job: Job, log: Path):
        self.job, self._log, self._read = job, log, 0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        # The store is served here, as in torchrun's agent, so its port is open before the ranks connect.
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes = {fork(job, rank, self._store.port, log) for rank in range(job.ranks)}

    def has_ended(self) -> bool:
        """Return whether all ranks have ended. Exits with the end of the log if one has failed."""
        for process in list(self._processes):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                self._processes.remove(process)
            if found and status:
                print("\n".join(self._log.read_text().splitlines()[-SHOWN:]))
                sys.exit(f"error: {self.job.name} failed; complete log: {self._log}")
        return not self._processes

    def print_progress(self) -> None:
        """Print what is new in the log: iterations and validations."""
        with self._log.open() as stream:
            stream.seek(self._read)
            text = stream.read()
        complete = text[: text.rfind("\n") + 1]
        self._read += len(complete.encode())
        for line in complete.splitlines():
            if found := ITERATION.search(line):
                print(f"        {self.job.name}: {', '.join(found.groups())} left", flush=True)
            elif found := VALIDATION.search(line):
                print(f"        {self.job.name}: {found[0]}", flush=True)


def _mark(logs: Path, job: Job) -> Path:
    return logs / f"{job.name}.done"


def _text(job: Job) -> str:
    return shlex.join(job.words) + "\n"


def fork(job: Job, rank: int, port: int, log: Path) -> int:
    """Start a rank of a job, and return its process id."""
    runner = os.getpid()
    if process := os.fork():
        return process
    end_with_parent(runner)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "LOCAL_WORLD_SIZE": job.ranks}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    words = job.words
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)
    code = 1
    try:
        if words[0].endswith(".py"):
            sys.argv = list(words)
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
        else:
            megatron_qad(list(words))
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
