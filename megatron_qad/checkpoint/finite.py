"""Checks that weights are finite, before and after a change of dtype."""

import torch

from megatron_qad.engine.errors import QADError

_TILE_ELEMENTS = 1 << 20


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
    """NaN and Inf are among the extremes, whose search takes a twentieth of the time of isfinite and no memory."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize > 1:
        return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
    return all(bool(torch.isfinite(part.float()).all()) for part in tensor.reshape(-1).split(_TILE_ELEMENTS))
