"""MLP layers whose inner width differs from layer to layer (Llama Nemotron Super), for both layer specs."""

import copy
from collections.abc import Sequence

from megatron.core.ssm.mlp_layer import MLPLayer


class VariableWidthMLPLayer(MLPLayer):
    """Megatron's MLP layer with a config of its own.

    Args:
        widths: inner width of each layer of the whole model, in the order of the layer pattern.
    """

    def __init__(self, config, submodules, layer_number: int, *, widths: Sequence[int], **kwargs):
        own = copy.copy(config)
        own.ffn_hidden_size = widths[layer_number - 1]  # counted from 1, over all pipeline stages
        super().__init__(own, submodules, layer_number, **kwargs)
