"""Level 0: the interface to the internals of Megatron and torch, run directories, and the error class for users.

``loop`` reports the events of Megatron's training loop (``events``), ``patches`` lists all replaced attributes, ``cpu``
runs Megatron without a GPU, ``run_directory`` makes checkpoints atomic, ``capabilities`` detects hardware and packages.

Every entry point calls ``init_runtime()`` before it first imports ``megatron``: it installs the CPU backend if there is
no GPU. Importing this package has no side effects."""

from megatron_qad.engine.capabilities import Capabilities, capabilities, init_runtime
from megatron_qad.engine.errors import QADError

__all__ = ["Capabilities", "QADError", "capabilities", "init_runtime"]
