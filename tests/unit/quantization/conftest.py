"""Fixtures: a model chunk of linears with Megatron's module names, without Megatron's parallel state."""

import pytest
import torch


@pytest.fixture
def make_chunk():
    def make(widths=(32, 48, 16), *, dtype=torch.float32, first_layer: int = 1) -> torch.nn.Module:
        """Build linears widths[0] -> widths[1] -> ...; layer i is ``decoder.layers.{first_layer - 1 + i}.linear``."""
        generator = torch.Generator().manual_seed(0)
        chunk = torch.nn.Module()
        chunk.decoder = torch.nn.Module()
        chunk.decoder.layers = torch.nn.ModuleList()
        for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            layer = torch.nn.Module()
            layer.layer_number = first_layer + i
            layer.linear = torch.nn.Linear(fan_in, fan_out, bias=False, dtype=dtype)
            layer.linear.weight.data = torch.randn(fan_out, fan_in, generator=generator).to(dtype)
            chunk.decoder.layers.append(layer)
        return chunk

    return make


@pytest.fixture
def linears():
    """Function that returns the linears of a chunk, in order."""
    return lambda chunk: [layer.linear for layer in chunk.decoder.layers]
