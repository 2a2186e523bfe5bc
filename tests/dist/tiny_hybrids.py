"""Tiny Nemotron-H, Qwen3-MoE and Nemotron-NAS models with the hub's tensor names, and their transformers models.

There are models with a single layer kind and models with full patterns. Sizes can be split over two tensor-parallel
ranks (heads, groups and 16-element blocks) and over four expert-parallel ranks.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tiny_job import LLAMA

from megatron_qad.models.families import family_of

NEMOTRON_H = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*-ME",
    "num_hidden_layers": 6,
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "routed_scaling_factor": 2.5,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "mlp_hidden_act": "relu2",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    # transformers sums over the wrong axis if a sequence has several chunks, and clamps small time steps. Avoid both.
    "chunk_size": 256,
    "time_step_min": 0.0,
    "torch_dtype": "float32",
}
QWEN3_MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "torch_dtype": "float32",
    "max_position_embeddings": 512,
}
NEMOTRON_NAS = LLAMA | {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "num_hidden_layers": 5,
    "num_key_value_heads": None,
    "intermediate_size": None,
    "block_configs": [
        {"attention": {"n_heads_in_group": group, "no_op": group is None}, "ffn": ffn}
        for group, ffn in (
            (2, {"ffn_mult": 1.0}),
            (None, {"ffn_mult": 8.0}),
            (2, {"ffn_mult": None, "no_op": True}),
            (None, {"ffn_mult": 1.0}),
            (2, {"ffn_mult": 8.0}),
        )
    ],
    "torch_dtype": "float32",
    "max_position_embeddings": 512,
}


def _pattern(symbols: str, **changes) -> dict:
    return NEMOTRON_H | {"hybrid_override_pattern": symbols, "num_hidden_layers": len(symbols)} | changes


WHOLE = {
    "nemotron-h": NEMOTRON_H,
    "nemotron-h, latent experts": _pattern("ME*E", moe_latent_size=32),
    "nemotron-h dense": _pattern("M-M*-M-"),
    "qwen3-moe": QWEN3_MOE,
    "nemotron-nas": NEMOTRON_NAS,
}
CASES = WHOLE | {
    "mamba": _pattern("M"),
    "mamba, a group a head": _pattern("MM", n_groups=8),
    "attention": _pattern("**"),
    "mlp": _pattern("-"),
    "experts": _pattern("E"),
    "experts in groups": _pattern("EE", n_group=4, topk_group=2, num_experts_per_tok=4),
    "experts, top 1": _pattern("*E", num_experts_per_tok=1, routed_scaling_factor=1.0, norm_topk_prob=False),
    "qwen3-moe, softmax over all": QWEN3_MOE | {"norm_topk_prob": False, "mlp_only_layers": [1]},
}
SEQ_LENGTH = 160
"""Longer than one 128-token chunk of the scan in Megatron's Mamba layers."""


def has_experts(case: str) -> bool:
    return "E" in family_of(CASES[case]).layer_pattern(CASES[case])


def by_transformers(directory: str | Path) -> transformers.PreTrainedModel:
    """Load a directory with the hub's tensor names in transformers, without missing or unexpected tensors."""
    config = json.loads((Path(directory) / "config.json").read_text())
    if config["model_type"] == "nemotron-nas":
        return _nas_llama(config, load_file(Path(directory) / "model.safetensors"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    mismatches = {what: list(names) for what, names in info.items() if names}
    assert not mismatches, mismatches
    return model.eval()


class _Zero(torch.nn.Module):
    """Replaces the attention or MLP that a block lacks, and adds zero to the residual."""

    def __init__(self, returns_weights: bool):
        super().__init__()
        self.returns_weights = returns_weights

    def forward(self, hidden_states, **kwargs):
        zero = torch.zeros_like(hidden_states)
        return (zero, None) if self.returns_weights else zero


def _nas_llama(config: dict, tensors: dict[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """Build the model from transformers' Llama with other MLPs and removed parts. The hub's model has custom code."""
    blocks = config["block_configs"]
    llama_config = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    llama_config |= {"num_key_value_heads": config["num_attention_heads"] // 2, "intermediate_size": 256}
    settings = transformers.LlamaConfig(**llama_config, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(settings)
    for block, layer in zip(blocks, model.model.layers, strict=True):
        if block["attention"].get("no_op"):
            layer.input_layernorm, layer.self_attn = torch.nn.Identity(), _Zero(returns_weights=True)
        if block["ffn"].get("no_op"):
            layer.post_attention_layernorm, layer.mlp = torch.nn.Identity(), _Zero(returns_weights=False)
        elif block["ffn"]["ffn_mult"] == 8.0:  # 2/3 of 8 * 64 is 341, rounded up to 512
            layer.mlp = type(layer.mlp)(transformers.LlamaConfig(**llama_config | {"intermediate_size": 512}))
    model.load_state_dict(tensors)
    return model.float().eval()


def tokens(case: str, rows: int) -> torch.Tensor:
    """Return random token ids, int64 [rows, SEQ_LENGTH]."""
    generator = torch.Generator().manual_seed(len(case))
    return torch.randint(0, CASES[case]["vocab_size"], (rows, SEQ_LENGTH), generator=generator)


def gradients(model: transformers.PreTrainedModel, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the cross entropy per unmasked token over the microbatches, and its gradients by hub tensor names."""
    model.zero_grad()
    count = sum(batch["loss_mask"].sum() for batch in batches)
    total = 0.0
    for batch in batches:
        logits = model(batch["tokens"], use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        loss = (losses * batch["loss_mask"].flatten()).sum() / count
        loss.backward()
        total += loss.item()
    grads = {}
    for name, parameter in model.named_parameters():
        grads |= hub_names(model.config.model_type, name, parameter.grad)
    return total, grads


def hub_names(model_type: str, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Convert a transformers tensor to the hub's names: another prefix, separate experts, separate gate and up."""
    if model_type == "nemotron_h":
        name = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
    if ".experts." not in name:
        return {name: tensor}
    stem, projection = name.rsplit(".", 1)
    projections = ["gate_proj", "up_proj"] if projection == "gate_up_proj" else [projection]
    return {
        f"{stem}.{i}.{part}.weight": rows
        for i, expert in enumerate(tensor)
        for part, rows in zip(projections, expert.chunk(len(projections)), strict=True)
    }
