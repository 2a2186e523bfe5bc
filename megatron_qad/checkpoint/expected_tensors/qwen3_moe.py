"""Expected tensors of Qwen3-MoE: Qwen3 with experts instead of most MLPs."""

from typing import Any

from megatron_qad.checkpoint.expected_tensors import qwen3
from megatron_qad.checkpoint.expected_tensors.model_inventory import Inventory, positive_integer


def expected_tensors(config: dict[str, Any]) -> Inventory:
    """Return the inventory of a model of this family."""
    model = qwen3.expected_tensors(config)
    hidden, width = positive_integer(config, "hidden_size"), positive_integer(config, "moe_intermediate_size")
    # transformers 5 saves num_local_experts.
    num_experts = positive_integer(config, "num_experts", config.get("num_local_experts"))
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    for index in range(positive_integer(config, "num_hidden_layers")):
        if index in dense or (index + 1) % step:
            continue
        mlp = f"model.layers.{index}.mlp"
        gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        for module in (*gate_up, f"{mlp}.down_proj"):
            del model.linears[module]
        model.fused.remove(gate_up)
        model.tensors[f"{mlp}.gate.weight"] = (num_experts, hidden)
        model.never_quantized.append(f"{mlp}.gate")  # servers build this router as a linear, unlike Nemotron-H's
        for expert_index in range(num_experts):
            expert = f"{mlp}.experts.{expert_index}"
            model.linears[f"{expert}.gate_proj"] = model.linears[f"{expert}.up_proj"] = (width, hidden)
            model.linears[f"{expert}.down_proj"] = (hidden, width)
            model.fused.append((f"{expert}.gate_proj", f"{expert}.up_proj"))
        model.experts.append(tuple(name for name in model.linears if name.startswith(f"{mlp}.experts.")))
    return model
