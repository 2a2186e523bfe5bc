"""Scales of inputs, keys and values, chosen so that every serving kernel computes the same codes with them.

Training, export and validation call these functions. Only amaxes are stored in checkpoints.
"""

import torch
from torch import Tensor

_TIE_FREE = 1.0 + 2.0**-13


def tie_free(scale: Tensor) -> Tensor:
    """Return an NVFP4 global scale that is ``2^-13`` larger, so that no bfloat16 input lies on a rounding boundary.

    Kernels divide by the global scale, multiply by its reciprocal, or fuse both with the factor 1/6; their results
    differ in the last bits. With ``amax / 2688`` of a bfloat16 amax, many inputs lie exactly halfway between two codes
    or two block scales, and the last bit decides. With this factor the nearest input is a relative 2^-20 away from
    halfway, while the results of all kernels agree to within 2^-20.7. The factor is above 1, so nothing saturates.

    Args:
        scale: float32, any shape.
    """
    return scale * torch.full_like(scale, _TIE_FREE)


def round_up_to_bf16(scale: Tensor) -> Tensor:
    """Return the smallest bfloat16 numbers that are not below float32 ``scale`` >= 0, as float32.

    vLLM holds KV cache scales in the dtype of the model (``BaseKVCacheMethod.create_weights`` in
    ``model_executor/layers/quantization/kv_cache.py``), so it would round others. Rounding up keeps the amax covered.
    """
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
