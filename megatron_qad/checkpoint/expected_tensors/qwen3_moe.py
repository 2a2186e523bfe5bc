"""Expected tensors of Qwen3-MoE: Qwen3 with experts instead of most MLPs."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors import qwen3
from megatron_qad.checkpoint.expected_tensors.model_inventory import (
    Inventory,
    num_experts,
    num_layers,
    positive_integer,
)
from megatron_qad.engine import config_values as values


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    # 4 key-value heads are the default of Qwen3-MoE's config class, which has no head_dim.
    model = qwen3.expected_tensors({"num_key_value_heads": 4, "head_dim": None} | config)
    hidden, width = positive_integer(config, "hidden_size"), positive_integer(config, "moe_intermediate_size")
    step, dense = positive_integer(config, "decoder_sparse_step", 1), values.items(config, "mlp_only_layers", int, [])
    sparse = [index for index in range(num_layers(config)) if index not in dense and not (index + 1) % step]
    # transformers 5 saves num_local_experts.
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    count = num_experts(config, key, len(sparse))
    for index in sparse:
        mlp = f"model.layers.{index}.mlp"
        gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        for module in (*gate_up, f"{mlp}.down_proj"):
            del model.linears[module]
        model.fused.remove(gate_up)
        model.tensors[f"{mlp}.gate.weight"] = (count, hidden)
        model.never_quantized.append(f"{mlp}.gate")  # servers build this router as a linear, unlike Nemotron-H's
        for expert_index in range(count):
            expert = f"{mlp}.experts.{expert_index}"
            model.linears[f"{expert}.gate_proj"] = model.linears[f"{expert}.up_proj"] = (width, hidden)
            model.linears[f"{expert}.down_proj"] = (hidden, width)
            model.fused.append((f"{expert}.gate_proj", f"{expert}.up_proj"))
        model.experts.append(tuple(name for name in model.linears if name.startswith(f"{mlp}.experts.")))
    return model
