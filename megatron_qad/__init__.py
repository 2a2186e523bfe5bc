"""megatron_qad: quantization-aware distillation to NVFP4 on NVIDIA's Megatron.

Importing this package starts nothing and touches no device. The rooms, from the lowest floor up:

0. ``engine``        Megatron and torch made to fit, run directories, errors
1. ``formats``       NVFP4 arithmetic;  ``config``  the options
2. ``models``, ``quantization``, ``distillation``, ``data``
3. ``training``, ``checkpoint``
4. ``report``
"""

__version__ = "0.1.0"
