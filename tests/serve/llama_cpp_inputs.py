"""Rounds the inputs of linears as llama.cpp does for NVFP4 weights: to 8 bits in blocks of 32."""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BLOCK = 32


class RoundedInputs(TorchFunctionMode):
    """Context in which each ``torch.nn.functional.linear`` rounds its input, also in experts without modules.

    Args:
        exact: shapes of the weights that llama.cpp holds in float32. Inputs of such a weight are not rounded.
    """

    def __init__(self, exact: Collection[tuple[int, ...]]):
        super().__init__()
        self.exact, self.num_rounded = set(exact), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear and tuple(args[1].shape) not in self.exact:
            self.num_rounded += 1
            args = (rounded(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


def rounded(inputs: Tensor) -> Tensor:
    """Round to ggml's Q8_0: int8 codes times a scale per block of 32, which is stored in float16. [..., 32 n]"""
    blocks = inputs.unflatten(-1, (-1, _BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0).round()
    return (codes * scale.half()).flatten(-2)
