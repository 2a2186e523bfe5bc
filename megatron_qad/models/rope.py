"""Rotary frequencies with llama3 scaling, for which Megatron's ``HybridModel`` has no argument."""

import math

import torch


def llama3_inv_freq(dim: int, base: float, scaling: dict) -> torch.Tensor:
    """Return the inverse frequencies of Llama 3.1's rope scaling, float32 [dim / 2].

    Wavelengths longer than ``original / low_freq_factor`` are multiplied by ``factor``, those shorter than
    ``original / high_freq_factor`` are unchanged, and in between the scaling is interpolated linearly in frequency.
    Source: Llama 3.1 model card, transformers' ``modeling_rope_utils``.

    Args:
        dim: rotary dimension, the size of one head.
        base: ``rope_theta``.
        scaling: parameters from ``Family.rope_scaling``, with ``factor``, ``low_freq_factor``, ``high_freq_factor`` and
            ``original_max_position_embeddings``.
    """
    original = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    wavelength = 2 * math.pi / inv_freq
    keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 1: high frequency, 0: low frequency
    return (1 - keep) * inv_freq / factor + keep * inv_freq
