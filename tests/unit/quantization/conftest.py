"""Fixtures: a model chunk of linears with Megatron's module names, without Megatron's parallel state."""

import pytest
import torch

from megatron_qad.quantization.names import of_expert


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


class AllExperts(torch.nn.Module):
    """One linear of each of three experts, 3 to 5 of the model, with the attributes of ``GroupedLinear``."""

    first_expert = 3

    def __init__(self):
        super().__init__()
        weight = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(weight * torch.tensor([1.0, 3.0, 0.2]).view(3, 1, 1))

    def forward(self, x, tokens_per_expert):
        return torch.cat([rows @ w.t() for rows, w in zip(x.split(tokens_per_expert), self.weight, strict=True)]), None


@pytest.fixture
def experts(make_chunk):
    """Function that returns a chunk with one layer of experts, their linear, and the formats of all six experts."""

    def make():
        chunk = make_chunk((32, 32))
        layer = chunk.decoder.layers[0]
        layer.mlp = torch.nn.Module()
        layer.mlp.experts = torch.nn.Module()
        layer.mlp.experts.linear_fc1 = AllExperts()
        name = "decoder.layers.0.mlp.experts.experts.*.linear_fc1.weight"
        return chunk, layer.mlp.experts.linear_fc1, {of_expert(name, i): "nvfp4" for i in range(6)}

    return make
