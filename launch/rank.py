"""Starts one rank: ``rank.py PROGRAM.py ARGUMENTS`` executes ``python PROGRAM.py ARGUMENTS``.

torchrun gives each rank its own session, so neither Ctrl-C nor the death of the agent reaches it. Before the program
starts, this script makes the rank end with its parent, and ignore the signals that request a save and stop until the
program installs its handler. The parent is ``QAD_AGENT_PID``: torchrun's agent, or SLURM's slurmstepd (``task.py``).
"""

import os
import signal
import sys

# First, because importing takes a moment in which a signal would end the rank.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_DFL)

from megatron_qad.engine.processes import end_with_parent  # noqa: E402

if os.environ["QAD_AGENT_PID"]:  # empty: task.py found that the rank must not depend on its parent's threads
    end_with_parent(int(os.environ["QAD_AGENT_PID"]))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
