"""Starts one rank for torchrun.sh: ``rank.py PROGRAM.py ARGUMENTS`` executes ``python PROGRAM.py ARGUMENTS``.

torchrun gives each rank its own session, so neither Ctrl-C nor the death of the agent reaches it. Before the program
starts, this script makes the rank end with the agent, and ignore the signals that request a save and stop until the
program installs its handler.
"""

import os
import signal
import sys
from pathlib import Path

# Imports the file without its package, which imports torch: in those seconds a signal would end the rank.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "megatron_qad" / "engine"))
from processes import end_with_parent  # noqa: E402

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_DFL)
end_with_parent(int(os.environ["QAD_AGENT_PID"]))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
