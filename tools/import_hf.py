"""Runs ``megatron-qad import`` from a checkout, in one process or as a rank of torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_qad.cli.commands.import_command import main  # noqa: E402
from megatron_qad.engine import entry_point  # noqa: E402

if __name__ == "__main__":
    entry_point.run(main)
