"""Difficult test inputs for NVFP4 kernels, and a bitwise comparison with the reference."""

import torch
from torch import Tensor


def hard_values(rows: int, dim: int, dtype: torch.dtype, seed: int, exponent: int = 0) -> Tensor:
    """Return a tensor [rows, dim] of values that are hard to round, multiplied by 2^exponent. ``rows`` must be >= 3.

    It has a row of zeros, -0.0, ties, subnormal block scales, and rows of very different magnitudes.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator) * torch.exp(4 * torch.randn(rows, 1, generator=generator))
    x[0], x[1, ::3] = 0.0, -0.0
    x[2] = torch.randint(-24, 25, (dim,), generator=generator) / 4
    return (x.clamp_(-3e4, 3e4).mul_(2.0**exponent)).to(dtype)


def differing_values(ours: Tensor, reference: Tensor) -> int:
    """Count the elements whose bits differ in two tensors of equal shape and float dtype, on ``reference``'s device.

    Zeros of different sign differ.
    """
    assert ours.dtype == reference.dtype and ours.shape == reference.shape, (ours.dtype, ours.shape, reference)
    integer = torch.int32 if ours.dtype == torch.float32 else torch.int16
    return (ours.to(reference.device).view(integer) != reference.view(integer)).sum().item()
