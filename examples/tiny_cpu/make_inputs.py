"""Makes the inputs of the demo without downloads: texts, a tokenizer trained on them, and an untrained tiny Llama.

The source is CPython's own help (``pydoc_data.topics``, 700 KB of English about Python). It is written to three files:

- ``raw.txt``: the original topics, on which the teacher's first stage, QAT and QAD train;
- ``post.txt``: the same topics in another style (lower case, one paragraph per line, no markup), for the teacher's
  second stage. It moves the teacher away from the raw text as post-training moves a model away from its corpus;
- ``heldout.txt``: other original topics, used for validation only.
"""

import argparse
import re
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 1024
HELDOUT_EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    output.mkdir(parents=True)
    write_texts(output)
    model = output / "hf"
    write_model(model)
    write_tokenizer(output / "raw.txt", model / "tokenizer")
    print(f"wrote texts, tokenizer and an untrained model to {output}")


def write_texts(output: Path) -> None:
    names = sorted(topics)
    heldout = names[::HELDOUT_EVERY]
    raw = [topics[name] for name in names if name not in heldout]
    (output / "raw.txt").write_text(SEPARATOR.join(raw))
    (output / "post.txt").write_text(SEPARATOR.join(_restyle(text) for text in raw))
    (output / "heldout.txt").write_text(SEPARATOR.join(topics[name] for name in heldout))


SEPARATOR = "\n\x1e\n"
"""Separates documents in a text file: ASCII's record separator (``prepare_data --split-on``)."""


def _restyle(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.lower())
    return "\n".join(re.sub(r"[^a-z0-9 .,]+", " ", " ".join(p.split())) for p in paragraphs)


def write_model(directory: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)


def write_tokenizer(text: Path, prefix: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(prefix),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "    "],
        minloglevel=2,
    )


if __name__ == "__main__":
    main()
