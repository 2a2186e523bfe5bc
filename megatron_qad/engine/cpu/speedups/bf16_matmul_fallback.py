"""Matrix products of BF16 tensors by float32 kernels, on CPUs for which oneDNN has no BF16 ones.

On such a CPU torch 2.11 multiplies BF16 in a plain loop: 1 GFLOPS on a core of an AMD EPYC with AVX2, whose float32
products run at 65. Here the operands are widened, which is exact, multiplied and summed in float32, and the result is
rounded to BF16 once, as BF16 instructions do. Registered below autograd, so that forward and backward passes of every
library in the process take it. Left out: float16; convolutions, which take two to three times as long as in float32.
"""

import functools
import warnings

import torch

_RETURNING = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu_backward")
_WRITING = ("mm.out", "bmm.out", "addmm.out", "baddbmm.out", "addmm_", "baddbmm_")
"""Into ``out`` or the first operand; what returns the same has the rest of the name."""


def is_needed() -> bool:
    """Whether torch multiplies BF16 tensors in its plain loop here: oneDNN needs AVX-512 on x86."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def install() -> torch.library.Library | None:
    """Register the products where they are needed, in this process, until it ends. Idempotent."""
    return register() if is_needed() else None


def register() -> torch.library.Library:
    """Put them in the place of torch's CPU kernels, where other dtypes still go, while the returned object is kept."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")  # that one is overridden
        kernels = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in (*_RETURNING, *_WRITING)}
        for name in _RETURNING:
            library.impl(name, _returning(kernels[name]), "CPU", with_keyset=True)
        for name in _WRITING:
            returning = kernels[name.removesuffix(".out").removesuffix("_")]
            library.impl(name, _writing(kernels[name], returning), "CPU", with_keyset=True)
    return library


def _returning(kernel):
    def product(keys, *args, **named):
        if not _is_bf16(args[0]):
            return kernel.call_boxed(keys, *args, **named)
        found = kernel.call_boxed(keys, *map(_wide, args), **{key: _wide(value) for key, value in named.items()})
        return found.bfloat16() if isinstance(found, torch.Tensor) else tuple(part.bfloat16() for part in found)

    return product


def _writing(kernel, returning):
    def product(keys, *args, **named):
        if not _is_bf16(args[0]):
            return kernel.call_boxed(keys, *args, **named)
        target = named.pop("out", args[0])
        found = returning.call_boxed(keys, *map(_wide, args), **named)
        return target.resize_(found.shape).copy_(found)

    return product


def _is_bf16(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16


def _wide(value):
    return value.float() if _is_bf16(value) else value
