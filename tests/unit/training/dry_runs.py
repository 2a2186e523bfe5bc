"""``pretrain_qad.py --qad-dry-run`` for each list of arguments on standard input (JSON), in children of one process
that has imported all. Prints a JSON list: status and output of each."""

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

import pretrain_qad


def main() -> None:
    print(json.dumps([in_child(argv) for argv in json.load(sys.stdin)]))


def in_child(argv: list[str]) -> tuple[int, str]:
    receives, sends = os.pipe()
    child = os.fork()
    if not child:
        printed, status = io.StringIO(), 1
        try:
            sys.argv = ["pretrain_qad.py", *argv, "--qad-dry-run"]
            with redirect_stdout(printed), redirect_stderr(printed):
                pretrain_qad.main()
            status = 0
        except BaseException as error:  # whatever it was, its parent is to print it
            printed.write(repr(error))
        os.write(sends, printed.getvalue().encode())
        os._exit(status)
    os.close(sends)
    with os.fdopen(receives) as file:
        printed = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed


if __name__ == "__main__":
    main()
