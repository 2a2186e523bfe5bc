"""MLP layers whose inner width differs from layer to layer (Llama Nemotron Super), for both layer specs."""

import copy
from collections.abc import Sequence

from megatron.core.ssm.mlp_layer import MLPLayer


class VariableWidthMLPLayer(MLPLayer):
    """Megatron's MLP layer with an inner width that depends on the layer number.

    Args:
        widths: inner width of each layer of the full model, in the order of the layer pattern.
    """

    def __init__(self, config, submodules, layer_number: int, *, widths: Sequence[int], **kwargs):
        layer_config = copy.copy(config)
        layer_config.ffn_hidden_size = widths[layer_number - 1]  # layer_number counts from 1 over all pipeline stages
        super().__init__(layer_config, submodules, layer_number, **kwargs)
