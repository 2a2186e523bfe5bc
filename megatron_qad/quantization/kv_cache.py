"""FP8 fake quantization of keys and values before attention, as a server with an FP8 KV cache computes them.

modelopt quantizes them in Transformer Engine's attention, but not in the core attention of the local layer spec. The
class here adds that, with the same names in checkpoints. Training uses the scale that is exported: amax / 448, rounded
up to bfloat16 (``formats.input_scales``), without the clamp to 1 that other exporters add.
"""

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer

from megatron_qad.quantization.names import named_modules_globally

KV_QUANTIZERS = ("k_bmm_quantizer", "v_bmm_quantizer")
"""Quantizer names under ``core_attention``, the same as modelopt's for Transformer Engine."""


class QuantCoreAttention(QuantModule):
    """Core attention that quantizes keys and values, after the rotary embedding."""

    def _setup(self):
        self.k_bmm_quantizer = TensorQuantizer()
        self.v_bmm_quantizer = TensorQuantizer()

    def forward(self, query, key, value, *args, **kwargs):
        return super().forward(query, self.k_bmm_quantizer(key), self.v_bmm_quantizer(value), *args, **kwargs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        amaxes = {
            name: tensor for name, tensor in self.state_dict(prefix="", keep_vars=True).items() if "_amax" in name
        }
        # Scalars, equal on all tensor-parallel ranks, like the amaxes of the linears' inputs.
        return state | make_sharded_tensors_for_checkpoint(amaxes, prefix, {}, sharded_offsets)


def quantize_kv_cache(chunk: torch.nn.Module, attributes: dict) -> dict[str, TensorQuantizer]:
    """Enable the key and value quantizers of every attention layer of a chunk that modelopt has prepared.

    Args:
        attributes: modelopt quantizer attributes.

    Returns:
        The quantizers by global name, for example ``decoder.layers.N.self_attention.core_attention.k_bmm_quantizer``.
    """
    quantizers = {}
    for name, module in named_modules_globally(chunk):
        if name.endswith(KV_QUANTIZERS):
            module.set_from_attribute_config(attributes)
            quantizers[name] = module
    return quantizers
