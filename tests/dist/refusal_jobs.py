"""Runs many jobs that end early, each in a process of its own that is forked from one rank."""

import contextlib
import json
import os
from pathlib import Path


def outcomes(cases: list[list[str]], result: str) -> None:
    """Write how each command line ends, as a dry run and as a job: [[dry run, job], ...].

    The outcome is the error that a user would see, "" if there was none, or the type of another exception.
    """
    pairs = [[_outcome([*argv, "--qad-dry-run"]), _outcome(argv)] for argv in cases]
    Path(result).write_text(json.dumps(pairs))


def _outcome(argv: list[str]) -> str:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "the process died"
        try:
            text = _run(argv)
        finally:
            os.write(write_end, text.encode())
            os._exit(0)  # not the exit handlers of the server
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def _run(argv: list[str]) -> str:
    import pretrain_qad
    from megatron_qad.engine import QADError

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            pretrain_qad.main(argv)
        except QADError as error:
            return str(error)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
    return ""
