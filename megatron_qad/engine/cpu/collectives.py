"""Collectives over gloo: it stands in for nccl, and gathers and scatters unequal shares, which nccl does and gloo not.

Shares are unequal where the ranks of a tensor-parallel group of experts were sent different numbers of tokens.
"""

import functools

import torch
from torch.nn.functional import pad

from megatron_qad.engine.patches import replace


def install() -> None:
    """Replace what Megatron calls in ``torch.distributed``."""
    replace("torch.distributed:init_process_group", _over_gloo)
    replace("torch.distributed:all_gather", lambda upstream: _any_shares(upstream, _gather_unequal, sizes_in=0))
    replace("torch.distributed:reduce_scatter", lambda upstream: _any_shares(upstream, _scatter_unequal, sizes_in=1))


def _over_gloo(init_process_group):
    @functools.wraps(init_process_group)
    def over_gloo(backend=None, *args, **kwargs):
        kwargs.pop("device_id", None)  # binds a rank to a GPU
        return init_process_group("gloo" if backend in (None, "nccl") else backend, *args, **kwargs)

    return over_gloo


def _any_shares(equal, unequal, sizes_in: int):
    """``equal`` for shares of one shape, ``unequal`` else; all ranks of a group see the same list of shapes."""

    @functools.wraps(equal)
    def collective(*args, **kwargs):
        shares = args[sizes_in] if len(args) > sizes_in else ()
        if len({share.shape for share in shares}) > 1:
            return unequal(*args, **kwargs)
        return equal(*args, **kwargs)

    return collective


def _gather_unequal(outputs: list[torch.Tensor], tensor: torch.Tensor, group=None) -> None:
    """Shares that differ in their first dimension, padded to the longest on their way."""
    longest = max(len(output) for output in outputs)
    ends = [0, 0] * (tensor.dim() - 1)
    padded = [output.new_empty(longest, *output.shape[1:]) for output in outputs]
    torch.distributed.all_gather(padded, pad(tensor, (*ends, 0, longest - len(tensor))), group=group)
    for output, share in zip(outputs, padded, strict=True):
        output.copy_(share[: len(output)])


def _scatter_unequal(output: torch.Tensor, inputs: list[torch.Tensor], group=None) -> None:
    """Sums over the ranks; each takes its share."""
    total = torch.cat(inputs)
    torch.distributed.all_reduce(total, group=group)
    output.copy_(total.split([len(share) for share in inputs])[torch.distributed.get_rank(group)])
