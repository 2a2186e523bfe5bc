"""The float32 masters of parameters, as Megatron's optimizers store them."""

import torch
from torch import Tensor


def master_part(parameter: torch.nn.Parameter, optimizer) -> tuple[Tensor, int] | None:
    """Return this rank's part of a parameter's master, flat, and the index of its first element in the parameter.

    Without a distributed optimizer the part is the whole master. A float32 parameter is its own master.

    Args:
        optimizer: Megatron's optimizer of the model.

    Returns:
        None if other data-parallel ranks hold the complete master.
    """
    if not getattr(parameter, "main_param_sharded", False):
        master = getattr(parameter, "main_param", None)
        return (parameter.detach() if master is None else master.detach()).view(-1), 0
    if parameter.main_param is None:
        return None
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])  # experts have one of their own
    owner = next(part for part in optimizers if parameter in getattr(part, "model_param_gbuf_map", ()))
    part = owner._get_model_param_range_map(parameter)["param"]
    assert part.size == parameter.main_param.numel(), "Megatron stores a master under another range"
    return parameter.main_param.detach().view(-1), part.start
