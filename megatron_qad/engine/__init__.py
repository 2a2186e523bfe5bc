"""Floor 0: what this process runs on, asked once; logging; the error that users read.

``prepare()`` comes before the first import of ``megatron`` in every entry point: it decides whether the CPU backend is
needed and installs it. Importing this package does nothing.
"""

from megatron_qad.engine.capabilities import Capabilities, capabilities, prepare
from megatron_qad.engine.errors import QADError

__all__ = ["Capabilities", "QADError", "capabilities", "prepare"]
