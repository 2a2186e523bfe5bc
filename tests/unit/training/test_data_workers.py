"""A process whose data workers are still there ends without an error."""

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


def test_data_workers_that_are_left_end_with_the_process_and_say_nothing():
    # torch's handler would raise in whatever Python code runs next.
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr
