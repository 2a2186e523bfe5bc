"""Matrix products of BF16 tensors with float32 kernels, on CPUs for which oneDNN has no BF16 kernels.

On such a CPU torch 2.11 multiplies BF16 in a plain loop: 1 GFLOPS on a core of an AMD EPYC with AVX2, where float32
products reach 65. Here the operands are converted to float32, which is exact, multiplied and summed, and the result is
rounded to BF16 once, as BF16 instructions do. The kernels are registered below autograd, so forward and backward passes
of every library in the process use them. Not supported: float16, and convolutions, which take two to three times as
long as in float32.
"""

import functools
import warnings

import torch

_RETURNING = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu_backward")
_WRITING = ("mm.out", "bmm.out", "addmm.out", "baddbmm.out", "addmm_", "baddbmm_")
"""Variants that write into ``out`` or the first operand; without the suffix, the name is in ``_RETURNING``."""


def is_needed() -> bool:
    """Whether torch multiplies BF16 tensors in a plain loop on this CPU: oneDNN needs AVX-512 on x86."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def install() -> torch.library.Library | None:
    """Register the kernels for the rest of the process if this CPU needs them. Idempotent."""
    return register() if is_needed() else None


def register() -> torch.library.Library:
    """Override torch's CPU kernels, which still handle other dtypes, as long as the returned object is kept."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # overriding is intended
        kernels = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in (*_RETURNING, *_WRITING)}
        for name in _RETURNING:
            library.impl(name, _wrap_returning(kernels[name]), "CPU", with_keyset=True)
        for name in _WRITING:
            returning = kernels[name.removesuffix(".out").removesuffix("_")]
            library.impl(name, _wrap_writing(kernels[name], returning), "CPU", with_keyset=True)
    return library


def _wrap_returning(kernel):
    def product(keys, *args, **kwargs):
        if not _is_bf16(args[0]):
            return kernel.call_boxed(keys, *args, **kwargs)
        result = kernel.call_boxed(keys, *map(_widen, args), **{key: _widen(value) for key, value in kwargs.items()})
        return result.bfloat16() if isinstance(result, torch.Tensor) else tuple(part.bfloat16() for part in result)

    return product


def _wrap_writing(kernel, returning):
    def product(keys, *args, **kwargs):
        if not _is_bf16(args[0]):
            return kernel.call_boxed(keys, *args, **kwargs)
        target = kwargs.pop("out", args[0])
        result = returning.call_boxed(keys, *map(_widen, args), **kwargs)
        return target.resize_(result.shape).copy_(result)

    return product


def _is_bf16(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16


def _widen(value):
    return value.float() if _is_bf16(value) else value
