"""Makes the example's inputs: tiny_cpu's texts and tokenizer, and an untrained Nemotron-H."""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tiny_cpu")]
from make_inputs import VOCAB_SIZE, write_texts, write_tokenizer  # noqa: E402
from random_hybrid import CONFIG, EXPERTS, write_model  # noqa: E402

HYBRID = CONFIG | {
    "hybrid_override_pattern": "MEM*-ME",
    "num_hidden_layers": 7,
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 256,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 32,
    "chunk_size": 256,
    **EXPERTS,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    model = output / "hf"
    model.mkdir(parents=True)
    write_texts(output)
    write_model(model, HYBRID)
    write_tokenizer(output / "raw.txt", model / "tokenizer")
    print(f"wrote texts, tokenizer and an untrained model to {output}")


if __name__ == "__main__":
    main()
