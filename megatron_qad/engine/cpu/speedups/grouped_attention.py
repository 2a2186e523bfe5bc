"""Grouped-query attention for transformers on a CPU, without copies of the shared keys and values.

With a mask, that is, in every batch of prompts of different lengths, transformers repeats keys and values for every
head, because torch's fused GPU kernels do not support a mask with shared heads. torch's CPU kernel does, but it reads
keys and values once for each head. For a single query token, the heads of a group are passed to it as rows of one head:
keys and values are read once, and matrix-vector products become matrix products.
"""

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_grouped"
"""Value of ``attn_implementation`` that selects this attention."""


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention with transformers' signature. Not supported: gradients and dropout.

    Args:
        query: [b, heads, s, head dim].
        key, value: [b, groups, t, head dim].
        attention_mask: bool [b, 1, s, t]. None means causal attention.
        scaling: factor on the scores. None means head dim ** -0.5.

    Returns:
        ([b, s, heads, head dim], None).
    """
    is_one_token = query.shape[2] == 1
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(*key.shape[:2], -1, query.shape[3]) if is_one_token else query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None and not is_one_token,
        scale=scaling,
        enable_gqa=not is_one_token,
    )
    return out.reshape(*query.shape[:3], -1).transpose(1, 2).contiguous(), None


def register() -> str:
    """Register the attention with transformers, and return its name."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
