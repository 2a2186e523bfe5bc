"""megatron_qad: quantization-aware distillation to NVFP4 on NVIDIA's Megatron.

Importing this package has no side effects. Its subpackages are on levels; each imports only from lower levels:

0. ``engine``        code that depends on internals of Megatron and torch, run directories, errors
1. ``formats``       number formats, one object each
2. ``models``, ``quantization``, ``distillation``, ``data``
3. ``config``        configuration of a job;  ``checkpoint``  import, export and validation of checkpoints
4. ``planning``      bytes per rank and step time, from config.json
5. ``training``      Megatron's job and its callbacks;  ``hf_training``  transformers' Trainer with a teacher
6. ``evaluation``    models compared token by token and by benchmarks
7. ``report``        run reports
8. ``cli``           the command megatron-qad

``api`` has the public names.
"""

import resource as _resource
import sys as _sys

_MIN_ADDRESS_SPACE = 4 << 30
"""Bytes that torch and Megatron map when they are imported, without any model: 3.2 GB on a CPU."""

_limit = _resource.getrlimit(_resource.RLIMIT_AS)[0]
if _limit != _resource.RLIM_INFINITY and _limit < _MIN_ADDRESS_SPACE:  # their imports would fail in many strange ways
    _sys.exit(
        f"error: the limit of address space is {_limit / 1e9:.3g} GB (ulimit -v); torch and Megatron alone need "
        f"{_MIN_ADDRESS_SPACE / 1e9:.3g} GB. Raise it: ulimit -v unlimited."
    )

__version__ = "0.2.0"
