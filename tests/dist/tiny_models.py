"""Tiny random models of every dense family, saved by transformers, for tests of conversion and of logits.

Sizes are drawn from the seed: head sizes other than hidden / heads, grouped queries, vocabulary sizes without small
factors, and odd numbers of blocks, so that two pipeline stages split a block. All parameters are random, including norm
weights and biases: with transformers' ones and zeros, a lost or swapped one would go unnoticed.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers

SEQ_LENGTH = 96


@dataclass(frozen=True)
class Tiny:
    """A test case: a family, with or without tied embeddings and rope scaling."""

    config_class: type
    seed: int
    tied: bool = False
    llama3_rope: bool = False


CASES = {
    "llama": Tiny(transformers.LlamaConfig, 1),
    "llama-tied": Tiny(transformers.LlamaConfig, 2, tied=True),
    "llama3-rope": Tiny(transformers.LlamaConfig, 3, llama3_rope=True),
    "llama3-rope-tied": Tiny(transformers.LlamaConfig, 4, tied=True, llama3_rope=True),
    "qwen2": Tiny(transformers.Qwen2Config, 5),
    "qwen2-tied": Tiny(transformers.Qwen2Config, 6, tied=True),
    "qwen3": Tiny(transformers.Qwen3Config, 7),
    "qwen3-tied": Tiny(transformers.Qwen3Config, 8, tied=True),
}


def config_of(case: str) -> transformers.PretrainedConfig:
    """Return the case's config. Two tensor-parallel ranks can split its heads and 16-element blocks."""
    tiny = CASES[case]
    draw = random.Random(tiny.seed)
    groups = draw.choice((2, 4))
    heads = groups * draw.choice((1, 2, 3))
    # Qwen2 has no head_dim: its hidden size is heads * head_dim. For others it differs from that, and is a multiple of
    # the heads (for Llama) and of 16 (for NVFP4).
    head_dim = draw.choice((16, 32))
    if tiny.config_class is transformers.Qwen2Config:
        sizes = {"hidden_size": heads * head_dim}
    else:
        possible = [n for n in range(48, 160, 16) if n % heads == 0 and n != heads * head_dim]
        sizes = {"hidden_size": draw.choice(possible), "head_dim": head_dim}
    rope = {"rope_type": "default", "rope_theta": draw.choice((10000.0, 500000.0, 1000000.0))}
    if tiny.llama3_rope:
        # Wavelengths below 64/4 are unchanged, above 64/1 scaled, in between interpolated. Sequences exceed 64 tokens.
        rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": draw.choice((8.0, 32.0))}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return tiny.config_class(
        num_hidden_layers=draw.choice((2, 3)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=draw.choice((64, 96, 160)),
        vocab_size=draw.choice((101, 197, 263)),
        max_position_embeddings=2048,
        rms_norm_eps=draw.choice((1e-5, 1e-6)),
        rope_parameters=rope,
        tie_word_embeddings=tiny.tied,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )


def make(case: str, directory: str | Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Save the case's model in ``dtype``, a tokenizer and a generation config in ``directory``. Returns the model."""
    config = config_of(case)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(CASES[case].seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:  # each GEMM preserves the scale of its input, so scores and logits are of order one
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    model = model.to(dtype)
    model.generation_config.max_length, model.generation_config.eos_token_id = 77, [2, 5]
    model.save_pretrained(directory)
    tokenizer(config.vocab_size).save_pretrained(directory)
    return model


def tokenizer(vocab_size: int) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with one word per id, and with a chat template that must be passed through."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


def tokens(case: str, rows: int) -> torch.Tensor:
    """Return random token ids, int64 [rows, SEQ_LENGTH]. The first column has the last id of the vocabulary."""
    generator = torch.Generator().manual_seed(CASES[case].seed + 1000)
    vocab = config_of(case).vocab_size
    drawn = torch.randint(0, vocab, (rows, SEQ_LENGTH), generator=generator)
    drawn[:, 0] = vocab - 1
    return drawn
