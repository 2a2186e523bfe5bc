"""Sizes of attention in a ``config.json``, which must fit together."""

from megatron_qad.engine import config_values as values
from megatron_qad.engine.errors import QADError


def heads(config: dict) -> tuple[int, int, int]:
    """Return the number of attention heads, the number of key-value heads, and the head dimension.

    Without ``num_key_value_heads`` each attention head has its own. Without ``head_dim`` the heads share the hidden
    size.
    """
    num_heads = values.integer(config, "num_attention_heads")
    num_groups = values.integer(config, "num_key_value_heads", num_heads)
    if num_heads % num_groups:
        raise QADError(
            f"{values.place(config)}: num_attention_heads {num_heads} is not a multiple of num_key_value_heads "
            f"{num_groups}. Each key-value head serves the same number of attention heads."
        )
    return num_heads, num_groups, _head_dim(config, num_heads)


def _head_dim(config: dict, num_heads: int) -> int:
    if config.get("head_dim") is not None:
        return values.integer(config, "head_dim")
    hidden = values.integer(config, "hidden_size")
    if hidden % num_heads:
        raise QADError(
            f"{values.place(config)}: hidden_size {hidden} is not a multiple of num_attention_heads {num_heads}, and "
            "there is no head_dim."
        )
    return hidden // num_heads
