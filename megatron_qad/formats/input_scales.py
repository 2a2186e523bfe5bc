"""Scales of inputs, keys and values, chosen so that every serving kernel computes the same codes with them.

Training, export and validation call these functions. Only amaxes are stored in checkpoints.
"""

import math

import torch
from torch import Tensor

_TIE_FREE = 1.0 + 2.0**-13
MIN_MARGIN = 2.0**-20
"""Margin above which the results of all kernels, which agree to within 2^-20.7, lie on one side of each boundary."""


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


def tie_margin(scale: Tensor) -> Tensor:
    """Return how far, relatively, the nearest bfloat16 input is from a rounding boundary under each NVFP4 global scale.

    A block with maximum a has the block scale E4M3(a / (6 * scale)), and an element x of it the code
    E2M1(x / (block_scale * scale)). Boundaries are midpoints between neighbouring numbers. Powers of two change
    nothing, so all pairs of mantissas of inputs, block scales and boundaries are compared.

    Args:
        scale: float32 or float64 [n], positive.

    Returns:
        float64 [n], on the CPU so that all ranks get the same.
    """
    inputs = 1 + torch.arange(128, dtype=torch.float64) / 128
    block_scales = 1 + torch.arange(8, dtype=torch.float64) / 8
    e2m1_boundaries = 1 + torch.arange(4, dtype=torch.float64) / 4
    e4m3_boundaries = 1 + torch.arange(16, dtype=torch.float64) / 16  # normal and subnormal
    of_codes = inputs.view(-1, 1, 1) / (block_scales.view(-1, 1) * e2m1_boundaries)
    of_block_scales = inputs.view(-1, 1) / (6 * e4m3_boundaries)
    quotients = torch.cat([of_codes.flatten(), of_block_scales.flatten()])
    exponents = (quotients / scale.detach().cpu().double().view(-1, 1)).log2()
    return torch.expm1((exponents - exponents.round()) * math.log(2)).abs().amin(1)


def round_up_to_bf16(scale: Tensor) -> Tensor:
    """Return the smallest bfloat16 numbers that are not below float32 ``scale`` >= 0, as float32.

    vLLM holds KV cache scales in the dtype of the model (``BaseKVCacheMethod.create_weights`` in
    ``model_executor/layers/quantization/kv_cache.py``), so it would round others. Rounding up keeps the amax covered.
    """
    bits = scale.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
