"""Makes the inputs of tiny QAD jobs: random models as Hugging Face directories, and data with loss masks."""

import json
from pathlib import Path

import numpy as np
import torch
from prepared import write_prepared
from safetensors.torch import save_file

from megatron_qad.models.families import family_of

# A vocabulary of 120, padded to 128 at TP1 and to 256 at TP2, where the second rank holds only padding.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 120,
    "tie_word_embeddings": False,
}
READ_HERE = ("--num-workers", "0")
"""Turns data worker processes off, whose start and end take an eighth of a tiny job or more. The jobs of
test_checkpoints, test_numbers, test_preemption and test_kill use them."""

SCALES_OF_EVERY_STEP = ("--qad-weight-scale-rule", "max")
"""Block scales from the current weights, for jobs that are compared with arithmetic of their own. By default they are
frozen (test_frozen)."""


def write_hf(
    directory: Path, config: dict, *, seed: int = 0, noise: float = 0.0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a random model as a Hugging Face directory; ``noise`` adds noise to each weight, relative to its scale."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    weight_rng, noise_rng = (torch.Generator().manual_seed(n) for n in (seed, seed + 1000))
    tensors = {}
    for tensor_map in family_of(config).all_tensors(config):
        for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True):
            # Larger than usual initial values, so that distributions are not uniform and the KL is not near zero.
            scale = {"norm": 0.1, "embedding": 0.5}.get(tensor_map.kind, 0.15)
            tensor = torch.randn(shape, generator=weight_rng) * scale
            tensor += torch.randn(shape, generator=noise_rng) * scale * noise
            tensor = tensor + 1 if tensor_map.kind == "norm" else tensor
            tensors[name] = tensor if tensor_map.is_float32 else tensor.to(dtype)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_data(prefix: Path, *, vocab_size: int, num_documents: int = 60, seed: int = 0, tokenizer=None) -> Path:
    """Write random tokens with loss masks; documents count different shares of their tokens, some of them none."""
    rng, documents, masks = np.random.default_rng(seed), [], []
    for i in range(num_documents):
        length = int(rng.integers(20, 60))
        documents.append(rng.integers(0, vocab_size, size=length))
        masks.append((rng.random(length) < (i % 5) / 4).astype(np.uint8))
    write_prepared(prefix, documents, masks, tokenizer=tokenizer)
    return prefix
