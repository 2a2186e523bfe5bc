"""Checks that weights are finite, before and after a change of dtype."""

import torch

from megatron_qad.engine.errors import QADError


def check_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise QADError, with ``name`` and the number of values, if a tensor of any dtype has NaN or Inf."""
    if not _is_finite(tensor):
        num_bad = int((~torch.isfinite(tensor.float())).sum())
        raise QADError(
            f"{name} has NaN or Inf values ({num_bad} of {tensor.numel()}). Use a model or an iteration without them."
        )


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str, advice: str) -> torch.Tensor:
    """Return ``tensor`` in ``dtype``.

    Args:
        advice: what to do if a finite value is beyond the range of ``dtype``, as a sentence.

    Raises:
        QADError: NaN or Inf values before or after the change.
    """
    result = tensor.to(dtype)
    if not _is_finite(result):
        check_finite(tensor, name)
        raise QADError(
            f"{name} has values up to {tensor.abs().max().item():.6g}, which overflow to Inf in "
            f"{str(dtype).removeprefix('torch.')} (largest value {torch.finfo(dtype).max:.6g}). {advice}"
        )
    return result


def _is_finite(tensor: torch.Tensor) -> bool:
    tensor = tensor.float() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor
    return bool(torch.isfinite(tensor).all())
