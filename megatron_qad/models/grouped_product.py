"""Product of tokens with the matrix of their expert: one grouped GEMM, or a loop where torch has none.

``torch.nn.functional.grouped_mm`` multiplies the rows of every expert in one call. It supports BF16, FP16 and float32
with aligned rows, on CPUs and GPUs; other dtypes and sizes are multiplied expert by expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Number of bytes by which ``grouped_mm`` requires every row to be aligned."""
_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_product(x: Tensor, weight: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
    """Multiply the rows of each expert with its matrix.

    Args:
        x: [tokens, in], sorted by expert.
        weight: [experts, out, in], of the same dtype.
        tokens_per_expert: number of rows of each expert; may be 0.

    Returns:
        [tokens, out], ``x[i] @ weight[expert of i].T``. Experts without tokens get a gradient of zeros.

    Example:
        >>> x, weight = torch.ones(3, 4), torch.stack([torch.ones(4, 4), 2 * torch.ones(4, 4)])
        >>> grouped_product(x, weight, [1, 2])[:, 0]
        tensor([4., 8., 8.])
    """
    if not can_group(x, weight):
        return looped_product(x, weight, tokens_per_expert)
    ends = torch.tensor(tokens_per_expert).cumsum(0, dtype=torch.int32)
    if x.is_cuda:  # the copy must not wait for the device, which still computes earlier layers
        ends = ends.pin_memory().to(x.device, non_blocking=True)
    output = torch.nn.functional.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)
    if output.requires_grad:  # the products of the backward pass need aligned rows, too
        output.register_hook(torch.Tensor.contiguous)
    return output


def looped_product(x: Tensor, weight: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
    """Compute ``grouped_product`` expert by expert, for every dtype and size. This is the reference."""
    # unbind has one gradient for all experts; indexing would create a zero gradient of the full weight for each.
    return torch.cat([rows @ w.t() for rows, w in zip(x.split(list(tokens_per_expert)), weight.unbind(), strict=True)])


def can_group(x: Tensor, weight: Tensor) -> bool:
    """Whether ``grouped_mm`` supports the product and its gradients: dtype, aligned rows, and at least one row."""
    elements = _ALIGNMENT // x.element_size()
    is_aligned = all(size % elements == 0 for size in weight.shape[1:])
    return x.dtype in _GROUPED_DTYPES and x.dtype == weight.dtype and is_aligned and len(x) > 0
