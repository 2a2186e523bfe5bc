"""Starts one rank for torchrun.sh: ``rank.py PROGRAM.py ARGUMENTS`` becomes ``python PROGRAM.py ARGUMENTS``.

torchrun gives each rank a session of its own, so that neither Ctrl-C nor the death of the agent reaches it. Before the
program is there, the rank is told to end with the agent, and to ignore the signals that ask a job to save and stop,
for which it has no handler yet.
"""

import os
import signal
import sys
from pathlib import Path

# The file alone: its package imports torch, and for those seconds a signal would end the rank.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "megatron_qad" / "engine"))
from processes import end_with_parent  # noqa: E402

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_DFL)
end_with_parent(int(os.environ["QAD_AGENT_PID"]))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
