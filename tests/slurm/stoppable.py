"""A program that behaves as pretrain_qad.py does when it is asked to stop (training/callbacks/preemption.py), and
starts in no time: for what the batch script does, not the ranks."""

import os
import signal
import sys
import time
from pathlib import Path

directory, asked = Path(os.environ["QAD_JOB_DIR"]), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
(directory / "stepped").touch()
print(f"on {len(os.sched_getaffinity(0))} cores\nrunning", flush=True)
while not asked and not (directory / "stop").exists():
    time.sleep(0.1)
    if Path(sys.argv[1]).exists():
        sys.exit("crashed")
(directory / "stopped").touch()
