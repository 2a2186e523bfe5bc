"""A process with running data workers ends without an error."""

import subprocess
import sys

PROGRAM = """
from megatron_qad.engine import init_runtime
init_runtime()
from torch.utils.data import DataLoader
import atexit
from megatron_qad.training import start
atexit.register(start._end_data_workers)
batches = iter(DataLoader(list(range(1000)), num_workers=1))
next(batches)
"""


def test_running_data_workers_end_with_the_process_without_errors():
    # torch's handler of SIGCHLD would raise in the Python code that runs next.
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
