"""Rotary frequencies that Megatron's ``HybridModel`` has no argument for."""

import math

import torch


def llama3_inv_freq(dim: int, base: float, scaling: dict) -> torch.Tensor:
    """Inverse frequencies of Llama 3.1's rope scaling, float32 [dim / 2].

    Wavelengths longer than the original context are stretched by ``factor``, those shorter than
    ``original / high_freq_factor`` are kept, and between the two the stretch is interpolated linearly in frequency.

    Args:
        dim: rotary dimension, one head's size.
        base: ``rope_theta``.
        scaling: ``factor``, ``low_freq_factor``, ``high_freq_factor``, ``original_max_position_embeddings``, as the
            Hugging Face config names them (Llama 3.1 model card; transformers' ``modeling_rope_utils``).
    """
    original = scaling["original_max_position_embeddings"]
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    wavelength = 2 * math.pi / inv_freq
    keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 1: high frequency, 0: low frequency
    return (1 - keep) * inv_freq / factor + keep * inv_freq
