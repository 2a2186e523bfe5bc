"""megatron_qad: quantization-aware distillation to NVFP4 on NVIDIA's Megatron.

Importing this package has no side effects. Its subpackages are on levels; each imports only from lower levels:

0. ``engine``        code that depends on internals of Megatron and torch, run directories, errors
1. ``formats``       number formats, one object each
2. ``models``, ``quantization``, ``distillation``, ``data``
3. ``config``        configuration of a job;  ``checkpoint``  import, export and validation of checkpoints
4. ``training``      the job and its callbacks
5. ``report``        run reports
"""

__version__ = "0.2.0"
