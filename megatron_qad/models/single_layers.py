"""Builds one layer of a model at a time, for models that do not fit into memory.

Each layer is a virtual pipeline stage of its own, so that Megatron's stages give it its global number and checkpoint
names. The first one also has the embedding, the last one the final norm and the output layer. Needs pipeline size 1.
"""

import logging

import torch
from megatron.core.models.hybrid import hybrid_layer_allocation
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_qad.models.builder import QADModelConfig


class SingleLayers:
    """The layers of a model, built on request.

    Args:
        config: config of the whole model; modified. Its pattern has no stage boundaries.

    Example::

        layers = SingleLayers(model_config(job.config, job.args, job.config.student))
        for index in range(len(layers)):
            layer = layers.build(index)  # without values
            load_weights([layer], checkpoint)
    """

    def __init__(self, config: QADModelConfig):
        self._config, pattern = config, config.hybrid_layer_pattern
        self._num_layers = len(pattern)
        config.hybrid_layer_pattern = "|".join(pattern)
        config.perform_initialization = False  # all values are loaded
        hybrid_layer_allocation.logger.setLevel(logging.WARNING)  # it would log a line for each layer
        self._groups = ProcessGroupCollection.use_mpu_process_groups()

    def __len__(self) -> int:
        return self._num_layers

    def build(self, index: int) -> torch.nn.Module:
        """Return the chunk of layer ``index``, counted from 0, on the device, without values and without a wrapper."""
        is_last = index == len(self) - 1
        builder = self._config.get_builder_cls()(self._config)
        layer = builder.build_model(self._groups, pre_process=index == 0, post_process=is_last, vp_stage=index)
        layer.vp_stage = None  # only its pattern is one of stages: Megatron's config has no virtual pipeline
        return layer.cuda(torch.cuda.current_device())

    def wrap(self, layer: torch.nn.Module) -> torch.nn.Module:
        """Convert a layer to the precision of the job, as Megatron's builder does. Returns the wrapped layer."""
        transformer = self._config.transformer
        if not transformer.bf16:
            return layer
        wrapped = Float16Module(transformer, layer)
        for module in wrapped.modules():
            if hasattr(module, "_maintain_float32_expert_bias"):
                module._maintain_float32_expert_bias()
        return wrapped
