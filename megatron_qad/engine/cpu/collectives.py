"""Collectives over gloo instead of NCCL, with gather and scatter of unequal shares, which gloo does not support.

Shares are unequal if the ranks of an expert tensor-parallel group received different numbers of tokens.
"""

import functools

import torch
from torch.nn.functional import pad

from megatron_qad.engine.patches import replace


def install() -> None:
    """Replace the functions of ``torch.distributed`` that Megatron calls."""
    replace("torch.distributed:init_process_group", _use_gloo)
    replace("torch.distributed:all_gather", lambda upstream: _dispatch(upstream, _gather_unequal, shares_arg=0))
    replace("torch.distributed:reduce_scatter", lambda upstream: _dispatch(upstream, _scatter_unequal, shares_arg=1))


def _use_gloo(init_process_group):
    @functools.wraps(init_process_group)
    def init_gloo(backend=None, *args, **kwargs):
        kwargs.pop("device_id", None)  # binds a rank to a GPU
        return init_process_group("gloo" if backend in (None, "nccl") else backend, *args, **kwargs)

    return init_gloo


def _dispatch(equal, unequal, shares_arg: int):
    """Call ``equal`` for shares of one shape, else ``unequal``. All ranks of a group see the same list of shapes."""

    @functools.wraps(equal)
    def collective(*args, **kwargs):
        shares = args[shares_arg] if len(args) > shares_arg else ()
        if len({share.shape for share in shares}) > 1:
            return unequal(*args, **kwargs)
        return equal(*args, **kwargs)

    return collective


def _gather_unequal(outputs: list[torch.Tensor], tensor: torch.Tensor, group=None) -> None:
    """Gather shares that differ in their first dimension, padded to the longest one during the transfer."""
    longest = max(len(output) for output in outputs)
    ends = [0, 0] * (tensor.dim() - 1)
    padded = [output.new_empty(longest, *output.shape[1:]) for output in outputs]
    torch.distributed.all_gather(padded, pad(tensor, (*ends, 0, longest - len(tensor))), group=group)
    for output, share in zip(outputs, padded, strict=True):
        output.copy_(share[: len(output)])


def _scatter_unequal(output: torch.Tensor, inputs: list[torch.Tensor], group=None) -> None:
    """Reduce-scatter shares that differ in their first dimension: sum over the ranks, then take this rank's share."""
    total = torch.cat(inputs)
    torch.distributed.all_reduce(total, group=group)
    output.copy_(total.split([len(share) for share in inputs])[torch.distributed.get_rank(group)])
