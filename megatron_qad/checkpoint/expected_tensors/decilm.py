"""Expected tensors of DeciLM (Llama with NAS): blocks without attention or MLP, or with replaced or resized parts."""

import math
from typing import Any

from megatron_qad.checkpoint.expected_tensors import llama
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory, num_layers, positive_integer
from megatron_qad.engine.errors import QADError


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a DeciLM model, whose blocks differ as described in ``block_configs``."""
    hidden, heads, blocks = positive_integer(config, "hidden_size"), positive_integer(config, "num_attention_heads"), []
    if isinstance(config.get("block_configs"), list):
        blocks = [block for block in config["block_configs"] if _is_block(block)]
    if len(blocks) != num_layers(config):
        raise QADError(
            f"config.json: block_configs describes {len(blocks)} blocks, expected num_hidden_layers of them."
        )
    # Start from standard Llama blocks, then replace the parts that differ.
    model = llama.expected_tensors(config | {"num_key_value_heads": heads, "intermediate_size": 1})
    for index, block in enumerate(blocks):
        layer = f"model.layers.{index}"
        for part, norm, module, square in (
            ("attention", "input_layernorm", "self_attn", "linear_attn"),
            ("ffn", "post_attention_layernorm", "mlp", "linear_mlp"),
        ):
            entry, prefix = block.get(part) or {}, f"{layer}.{module}."
            is_plain = not entry.get("no_op") and not entry.get("replace_with_linear")
            if is_plain and part == "attention":
                rows = (
                    heads
                    // positive_integer(entry, "n_heads_in_group")
                    * positive_integer(config, "head_dim", hidden // heads)
                )
                model.linears |= {f"{prefix}k_proj": (rows, hidden), f"{prefix}v_proj": (rows, hidden)}
            elif is_plain:
                width = _nas_width(entry, hidden)
                model.linears |= {f"{prefix}{name}_proj": (width, hidden) for name in ("gate", "up")}
                model.linears[f"{prefix}down_proj"] = (hidden, width)
            else:
                for name in [name for name in model.linears if name.startswith(prefix)]:
                    del model.linears[name]
                model.fused = [group for group in model.fused if not group[0].startswith(prefix)]
                model.attentions = [pair for pair in model.attentions if not pair[0].startswith(prefix)]
                if entry.get("no_op"):
                    del model.tensors[f"{layer}.{norm}.weight"]
                else:
                    model.linears[f"{prefix}{square}"] = (hidden, hidden)
    return model


def _is_block(block: Any) -> bool:
    return isinstance(block, dict) and all(isinstance(block.get(part) or {}, dict) for part in ("attention", "ffn"))


def _nas_width(ffn: dict, hidden: int) -> int:
    if ffn.get("intermediate_size") is not None:
        return positive_integer(ffn, "intermediate_size")
    factor = ffn.get("ffn_mult")
    if not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise QADError(f"config.json: an entry of block_configs has ffn_mult {factor!r}, expected a positive number.")
    return (int(2 * factor * hidden / 3) + 255) // 256 * 256
