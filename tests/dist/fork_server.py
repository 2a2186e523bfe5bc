"""Runs many small jobs of several ranks from one process that has imported everything once.

A rank of a QAD job takes ten seconds to import torch, Megatron and modelopt, and two to train a tiny model. This server
imports once and forks its ranks, so that twenty jobs run in the time of two. The fixture ``server`` is one for all
files of a process of tests. In the test:

    output = server.run("training_jobs:train", nproc=2, arguments={...})

Each rank calls ``module:function(**arguments)`` with torchrun's environment variables set. Left out: what torchrun
itself does; ``launch.run_workers`` is for that.
"""

import faulthandler
import gc
import glob
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from launch import ROOT, environment


class JobFailed(AssertionError):
    """A rank ended with another status than the test expects."""


class ForkServer:
    """The test's side. ``run`` blocks until all ranks of a job have ended.

    Args:
        directory: for logs.
        prefix: a command that starts the server, such as one that mounts something first.
    """

    def __init__(self, directory: Path, prefix: Sequence[str] = ()):
        self.directory, self._jobs, self._prefix = directory, 0, prefix

    def __enter__(self):
        self._log = open(self.directory / "server.log", "w")
        self._process = subprocess.Popen(
            [*self._prefix, sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=environment(),
        )
        return self

    def __exit__(self, *exc):
        self._process.stdin.close()
        self._process.wait(120)  # a busy machine takes its time
        self._log.close()

    def run(
        self,
        function: str,
        nproc: int = 1,
        arguments: dict | None = None,
        *,
        fails: bool = False,
        timeout=120,
        kill: dict | None = None,
    ):
        """Run one job and return the text of all its ranks' output, rank after rank.

        Args:
            fails: a rank must fail; None: may.
            kill: end ranks by SIGKILL: "after" seconds (from the start, or from when a path like "when" is there),
                only the rank "victim" first, if given. See ``_wait``.

        Raises:
            JobFailed: a rank failed, or none did though ``fails``; with the end of the output.
        """
        self._jobs += 1
        log = self.directory / f"job{self._jobs}"
        job = {"function": function, "nproc": nproc, "arguments": arguments or {}, "log": str(log)}
        job |= {"timeout": timeout, "kill": kill}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise JobFailed(f"the fork server died:\n{(self.directory / 'server.log').read_text()[-6000:]}")
        codes = json.loads(answer)
        output = "\n".join(_log_of(log, rank).read_text() for rank in range(nproc))
        if fails is not None and fails != any(codes):
            raise JobFailed(f"{function} on {nproc} ranks: exit statuses {codes}\n{output[-12000:]}")
        return output

    def results(self, worker: str, nproc: int, arguments: dict | None = None, timeout: float = 300) -> list:
        """``cases(arguments)`` of the module ``worker`` on each rank; rank 0's list, as of ``launch.run_workers``."""
        result = self.directory / f"results{self._jobs + 1}.json"
        given = {"worker": worker, "given": arguments or {}, "result": str(result)}
        self.run("launch:report_of", nproc, given, timeout=timeout)
        return json.loads(result.read_text())


def _log_of(log: str | Path, rank: int) -> Path:
    return Path(f"{log}.rank{rank}.log")


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    import pretrain_qad  # noqa: F401, I001  prepares the backend and imports all that a job needs
    import docstrings
    import torch

    docstrings.read_once()
    # A collection in a rank would write to every object that was imported, and so copy the pages that ranks share.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        # The ranks' store is served here, as torchrun's agent does: its port is held before any rank knows it.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [_start(job, rank, store.port) for rank in range(job["nproc"])]
        answers.write(json.dumps(_wait(ranks, job["timeout"], job["kill"])) + "\n")
        answers.flush()


def _start(job: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(_log_of(job["log"], rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()  # a rank that ends by a signal says where
    sys.stdout.reconfigure(line_buffering=True)  # what a rank said before it is killed is in its log
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["nproc"], "LOCAL_WORLD_SIZE": job["nproc"]}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    code = 0
    try:
        module, function = job["function"].split(":")
        getattr(importlib.import_module(module), function)(**job["arguments"])
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code)
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(ranks: list[int], timeout: float, kill: dict | None) -> list[int]:
    """Exit statuses. Once a rank has failed or time is up, the others, which would wait for it, are ended soon."""
    codes: dict[int, int] = {}
    end, grace = time.monotonic() + timeout, 5.0  # seconds for the others to print their own error
    moment = time.monotonic() + kill["after"] if kill and not kill.get("when") else None
    while len(codes) < len(ranks):
        if kill and moment is None and glob.glob(kill["when"]):
            moment = time.monotonic() + kill["after"]
        if kill and moment is not None and time.monotonic() >= moment:
            victim = kill.get("victim")
            for pid in ranks if victim is None else ranks[victim : victim + 1]:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
            kill, grace = None, 0.3
        for pid in ranks:
            if pid not in codes and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(status[1])
                if codes[pid]:
                    end = min(end, time.monotonic() + grace)
            elif pid not in codes and time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02 if kill is None else 0.002)
    return [codes[pid] for pid in ranks]


if __name__ == "__main__":
    _serve()
