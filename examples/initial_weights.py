"""Initial weights of the examples' random hybrid models."""

import math

import torch


def initial(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return initial values as usual for Mamba: decays of 1 to 16, step sizes of 0.001 to 0.1, norms and skips of 1."""
    last = name.rsplit(".", 1)[-1]
    if last == "A_log":
        return torch.empty(shape).uniform_(1, 16).log()
    if last == "dt_bias":
        dt = torch.exp(torch.rand(shape) * math.log(100) + math.log(0.001))
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if last == "D" or "norm" in name:
        return torch.ones(shape)
    if last in ("bias", "e_score_correction_bias"):
        return torch.zeros(shape)
    if "conv1d" in name:
        return torch.empty(shape).uniform_(-0.5, 0.5)
    return torch.randn(shape) * 0.02
