"""Keys and values in FP8 on their way into attention: what a server with an FP8 KV cache computes with.

modelopt quantizes them inside Transformer Engine's attention; for torch's (the local layer spec) it has nothing, so the
class here does the same there, with the same names in a checkpoint. The scale that training uses is the one that
is exported, amax / 448, without the clamp to 1 that other exporters add.
"""

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer

from megatron_qad.quantization.names import named_modules_globally

KV_QUANTIZERS = ("k_bmm_quantizer", "v_bmm_quantizer")
"""The names under ``core_attention``, as modelopt's for Transformer Engine."""


class QuantCoreAttention(QuantModule):
    """A core attention with quantizers for keys and values, after the rotary embedding."""

    def _setup(self):
        self.k_bmm_quantizer = TensorQuantizer()
        self.v_bmm_quantizer = TensorQuantizer()

    def forward(self, query, key, value, *args, **kwargs):
        return super().forward(query, self.k_bmm_quantizer(key), self.v_bmm_quantizer(value), *args, **kwargs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        amaxes = {
            name: tensor for name, tensor in self.state_dict(prefix="", keep_vars=True).items() if "_amax" in name
        }
        # Scalars that all tensor-parallel ranks share, like those of the linears' inputs.
        return found | make_sharded_tensors_for_checkpoint(amaxes, prefix, {}, sharded_offsets)


def quantize_kv_cache(chunk: torch.nn.Module, attributes: dict) -> dict[str, TensorQuantizer]:
    """Switch on the key and value quantizers of every attention layer of a chunk that modelopt has prepared.

    Args:
        attributes: modelopt's quantizer attributes.

    Returns:
        The quantizers by global name, ``decoder.layers.N.self_attention.core_attention.k_bmm_quantizer``.
    """
    found = {}
    for name, module in named_modules_globally(chunk):
        if name.endswith(KV_QUANTIZERS):
            module.set_from_attribute_config(attributes)
            found[name] = module
    return found
