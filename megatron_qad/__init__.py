"""megatron_qad: quantization-aware distillation to NVFP4 on NVIDIA's Megatron.

Importing this package starts nothing and touches no device. The rooms, from the lowest floor up:

0. ``engine``        what touches Megatron's and torch's internals, run directories, errors
1. ``formats``       one object per number format
2. ``models``, ``quantization``, ``distillation``, ``data``
3. ``config``        one frozen object per job;  ``checkpoint``
4. ``training``      the job and its callbacks
5. ``report``
"""

__version__ = "0.2.0"
