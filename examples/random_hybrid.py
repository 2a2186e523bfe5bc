"""Untrained Nemotron-H models for the examples: the part of the config that they share, and initial weights."""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from megatron_qad.models.families import family_of  # noqa: E402

CONFIG = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "conv_kernel": 4,
    "time_step_min": 0.0,
    "mlp_hidden_act": "relu2",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
EXPERTS = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "routed_scaling_factor": 1.0,
}


def write_model(directory: Path, config: dict) -> None:
    """Write an untrained model. Its tensors have the names of checkpoints on the hub, not transformers' own names.

    Args:
        directory: of the model; it must exist.
        config: of the whole model; ``torch_dtype`` is the type of the tensors that need not be float32.
    """
    torch.manual_seed(1)
    dtype, tensors = getattr(torch, config["torch_dtype"]), {}
    for tensor_map in family_of(config).tensors(config):
        for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True):
            tensors[name] = initial(name, shape).to(torch.float32 if tensor_map.is_float32 else dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def initial(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor's initial values. Mamba's are the usual ones: decays of 1 to 16, time steps of 0.001 to 0.1."""
    last = name.rsplit(".", 1)[-1]
    if last == "A_log":
        return torch.empty(shape).uniform_(1, 16).log()
    if last == "dt_bias":
        dt = torch.exp(torch.rand(shape) * math.log(100) + math.log(0.001))
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if last == "D" or "norm" in name:
        return torch.ones(shape)
    if last in ("bias", "e_score_correction_bias"):
        return torch.zeros(shape)
    if "conv1d" in name:
        return torch.empty(shape).uniform_(-0.5, 0.5)
    return torch.randn(shape) * 0.02
