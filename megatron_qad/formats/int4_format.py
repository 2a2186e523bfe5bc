"""INT4 weights in groups of 128: modelopt's own arithmetic in every forward pass. To train and evaluate; no export."""

from megatron_qad.formats.format import LinearFormat, NumberFormat


class INT4Numbers(NumberFormat):
    name = "int4"
    bits = 4.125
    block_size = 128
    tensor_scales = 0
    forward_attributes = {"num_bits": 4, "block_sizes": {-1: block_size}, "type": "dynamic", "enable": True}


INT4 = INT4Numbers()

INT4_W4A16 = LinearFormat("int4-w4a16", "weights in INT4, groups of 128; for training and evaluation only", weight=INT4)
