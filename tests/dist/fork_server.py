"""Runs many small jobs of several ranks from one process that has imported everything once.

A rank of a QAD job takes ten seconds to import torch, Megatron and modelopt, and two to train a tiny model. This server
imports once and forks its ranks, so that twenty jobs run in the time of two. The fixture ``server`` is shared by all
tests of a process. In the test:

    output = server.run("training_jobs:train", nproc=2, arguments={...})

Each rank calls ``module:function(**arguments)`` with torchrun's environment variables set. Not supported: tests of
torchrun itself; use ``launch.run_workers`` for them.
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
    """A rank ended with an unexpected exit status."""


class ForkServer:
    """The test's interface to the server process. ``run`` blocks until all ranks of a job have ended.

    Args:
        directory: directory for logs.
        prefix: command that starts the server, such as one that first mounts a file system.
        module: module that the server imports before it forks. pretrain_qad initializes the CPU backend and imports
            all modules of a job; ``hf_jobs`` leaves torch.cuda as it is.
    """

    def __init__(self, directory: Path, prefix: Sequence[str] = (), module: str = "pretrain_qad"):
        self.directory, self._jobs, self._prefix, self._module = directory, 0, prefix, module

    def __enter__(self):
        self._log = open(self.directory / "server.log", "w")
        self._process = subprocess.Popen(
            [*self._prefix, sys.executable, str(Path(__file__).resolve()), self._module],
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
        self._process.wait(120)  # a long limit, for busy machines
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
        """Run one job and return the output of all its ranks, rank after rank.

        Args:
            fails: whether a rank must fail. None means that it may.
            kill: kill ranks with SIGKILL "after" seconds, counted from the start or, if given, from when a path that
                matches "when" exists; all ranks, or only "victim" at first. See ``_wait``.

        Raises:
            JobFailed: a rank failed, or no rank failed although ``fails`` is set; with the end of the output.
        """
        self._jobs += 1
        log = self.directory / f"job{self._jobs}"
        job = {"function": function, "nproc": nproc, "arguments": arguments or {}, "log": str(log)}
        job |= {"timeout": timeout, "kill": kill}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        reply = self._process.stdout.readline()
        if not reply:
            raise JobFailed(f"the fork server died:\n{(self.directory / 'server.log').read_text()[-6000:]}")
        codes = json.loads(reply)
        logs = [_log_file(log, rank) for rank in range(nproc)]
        output = "\n".join(file.read_text() for file in logs if file.exists())  # a rank may be killed before it has one
        if fails is not None and fails != any(codes):
            raise JobFailed(f"{function} on {nproc} ranks: exit statuses {codes}\n{output[-12000:]}")
        return output

    def results(self, worker: str, nproc: int, arguments: dict | None = None, timeout: float = 300) -> list:
        """Run ``cases(arguments)`` of the module ``worker`` on each rank; return rank 0's list (``run_workers``)."""
        result = self.directory / f"results{self._jobs + 1}.json"
        given = {"worker": worker, "given": arguments or {}, "result": str(result)}
        self.run("launch:report_of", nproc, given, timeout=timeout)
        return json.loads(result.read_text())


def _log_file(log: str | Path, rank: int) -> Path:
    return Path(f"{log}.rank{rank}.log")


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of imports must not mix with the replies
    importlib.import_module(sys.argv[1])
    import torch

    if sys.argv[1] == "pretrain_qad":
        importlib.import_module("docstrings").read_once()
    # A garbage collection in a rank would write to every imported object, and so copy the pages that ranks share.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        # The ranks' store is served here, as in torchrun's agent, so its port is open before any rank connects.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [_start(job, rank, store.port) for rank in range(job["nproc"])]
        replies.write(json.dumps(_wait(ranks, job["timeout"], job["kill"])) + "\n")
        replies.flush()


def _start(job: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    log = os.open(_log_file(job["log"], rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()  # a rank that a signal kills prints its traceback
    sys.stdout.reconfigure(line_buffering=True)  # output before a kill is in the log
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
    """Return exit statuses. After a failure or a timeout, the other ranks, which would wait forever, are killed."""
    codes: dict[int, int] = {}
    end, grace = time.monotonic() + timeout, 5.0  # seconds for the others to print their errors
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
