"""transformers' attention on a CPU, without copies of the keys and values that several heads share.

transformers repeats them for every head wherever there is a mask, that is, in every batch of prompts of several
lengths: torch's fused kernels for GPUs take no mask with shared heads. Its kernel for CPUs does, but reads them once a
head. Where a token is written, the heads that share them are given to it as the rows of one: one read, and products
of a matrix instead of vectors.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_grouped"
"""What ``attn_implementation`` says."""


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """As transformers calls it, without gradients or dropout.

    Args:
        query: [b, heads, s, head dim].
        key, value: [b, groups, t, head dim].
        attention_mask: bool [b, 1, s, t], or None: causal.
        scaling: of the scores; None: head dim ** -0.5.

    Returns:
        ([b, s, heads, head dim], None).
    """
    writes_one = query.shape[2] == 1
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(*key.shape[:2], -1, query.shape[3]) if writes_one else query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None and not writes_one,
        scale=scaling,
        enable_gqa=not writes_one,
    )
    return out.reshape(*query.shape[:3], -1).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make it known to transformers under ``NAME``, which is returned."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
