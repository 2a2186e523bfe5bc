"""Floor 0: what touches the insides of Megatron and torch, run directories, and the error that users read.

``loop`` reports the events of Megatron's training loop (``events``), ``patches`` lists all that is replaced, ``cpu``
runs Megatron without a GPU, ``run_directory`` makes checkpoints whole, ``capabilities`` says what this process runs on.

``init_runtime()`` comes before the first import of ``megatron`` in every entry point: it decides whether the CPU
backend is needed and installs it. Importing this package does nothing."""

from megatron_qad.engine.capabilities import Capabilities, capabilities, init_runtime
from megatron_qad.engine.errors import QADError

__all__ = ["Capabilities", "QADError", "capabilities", "init_runtime"]
