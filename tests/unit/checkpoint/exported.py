"""A tiny dense model as export would stream it, for the tests of layouts, writer and validator."""

import torch

from megatron_qad.checkpoint.hf_inventory import inventory
from megatron_qad.checkpoint.layouts import HFTensor
from megatron_qad.formats.nvfp4 import fake_quant, global_scale_from_amax, tensor_amax

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
FAMILIES = {
    "llama": CONFIG,
    "qwen2": {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {**CONFIG, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "llama-tied": {**CONFIG, "tie_word_embeddings": True},
}


def items(config=CONFIG, unquantized=("lm_head",), seed=0):
    """The model's tensors, bfloat16; every linear but ``unquantized`` fake-quantized, with scales shared in fused
    groups."""
    generator = torch.Generator().manual_seed(seed)
    model = inventory(config)
    for name, shape in model.tensors.items():
        yield HFTensor(name, torch.randn(shape, generator=generator).bfloat16() * 0.05)
    weights = {m: torch.randn(s, generator=generator).bfloat16() * 0.05 for m, s in model.linears.items()}
    group_of = {module: group for group in model.fused for module in group}
    for module, weight in weights.items():
        if module == "lm_head" and model.tied_head:
            continue
        if module in unquantized:
            yield HFTensor(f"{module}.weight", weight, module)
            continue
        group = group_of.get(module, (module,))
        scale = global_scale_from_amax(torch.stack([tensor_amax(weights[m]) for m in group]).amax())
        input_scale = global_scale_from_amax(torch.tensor(1.0 + len(group[0])))
        yield HFTensor(f"{module}.weight", fake_quant(weight, scale), module, "nvfp4", scale, input_scale)


def linears(config=CONFIG):
    return list(inventory(config).linears)
