"""Helpers that export a tiny dense model, for the tests of layouts, writer and validator."""

import json

import torch
from safetensors.torch import load_file, save_file
from tiny_configs import NARROW_LLAMA as CONFIG

from megatron_qad.checkpoint.expected_tensors import inventory
from megatron_qad.checkpoint.hf_writer import write_hf_checkpoint
from megatron_qad.checkpoint.layouts import HFTensor, kv_scales
from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.formats.common import tensor_amax
from megatron_qad.formats.format_registry import FORMATS
from megatron_qad.formats.fp8_format import FP8_KV_CACHE

LAYER = "model.layers.1"
DOWN, Q, K, V, UP = (
    f"{LAYER}.{part}"
    for part in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
)
RECORD = {"checkpoint": "run", "iteration": "iter_0000001"}
FAMILIES = {
    "llama": CONFIG,
    "qwen2": {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {**CONFIG, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "llama-tied": {**CONFIG, "tie_word_embeddings": True},
}


def items(config=CONFIG, unquantized=("lm_head",), seed=0, format_of=lambda module: "nvfp4", kv_layout=None):
    """Yield the model's tensors in bfloat16; every linear except ``unquantized`` is fake-quantized, with shared scales
    in fused groups. ``format_of`` returns a linear's format; ``kv_layout`` adds the scales of an FP8 KV cache."""
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
        fmt = FORMATS[format_of(module)]
        scale = fmt.weight.scale_from_amax(torch.stack([tensor_amax(weights[m]) for m in group]).amax())
        input_scale = None if fmt.input is None else fmt.input.scale_from_amax(torch.tensor(1.0 + len(group[0])))
        yield HFTensor(f"{module}.weight", fmt.weight.fake_quant(weight, scale), module, fmt.name, scale, input_scale)
    if kv_layout is not None:
        for i, (k_proj, v_proj) in enumerate(model.attentions):
            amaxes = torch.tensor([1.0 + i]), torch.tensor([500.0])
            yield from kv_scales(k_proj, v_proj, *amaxes, kv_layout, FP8_KV_CACHE)


def linears(config=CONFIG):
    return list(inventory(config).linears)


def export(directory, layout, config=CONFIG, unquantized=("lm_head",), **kwargs):
    kwargs = {"config": config, "layout": layout, "linear_modules": linears(config), "record": RECORD} | kwargs
    write_hf_checkpoint(items(config, unquantized), directory, **kwargs)
    return directory


def issues(directory, with_sums=False):
    """Return the issues of a directory whose files a test may have changed."""
    return [str(issue) for issue in validate_nvfp4(directory, with_sums=with_sums).issues]


def edit(directory, change):
    """Apply ``change`` to the dict of tensors of a one-shard directory."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]) if callable(value) else value)


def poke(name, code):
    """Return a change that sets the first E4M3 byte of a block scale."""

    def change(tensors):
        tensors[name].view(torch.uint8)[0, 0] = code

    return change
