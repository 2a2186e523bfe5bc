"""Makes the inputs of the example: the texts and the tokenizer of tiny_cpu, and an untrained tiny Nemotron-H.

The tensors have the names of checkpoints on the hub, which transformers renames when it loads and saves them.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tiny_cpu")]
sys.path.insert(0, str(Path(__file__).parents[2]))
from initial_weights import initial  # noqa: E402
from make_inputs import VOCAB_SIZE, write_texts, write_tokenizer  # noqa: E402

from megatron_qad.models.families import family_of  # noqa: E402

CONFIG = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "MEM*-ME",
    "num_hidden_layers": 7,
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 32,
    "conv_kernel": 4,
    "chunk_size": 256,
    "time_step_min": 0.0,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "routed_scaling_factor": 1.0,
    "mlp_hidden_act": "relu2",
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    model = output / "hf"
    model.mkdir(parents=True)
    write_texts(output)
    write_model(model)
    write_tokenizer(output / "raw.txt", model / "tokenizer")
    print(f"wrote texts, tokenizer and an untrained model to {output}")


def write_model(directory: Path) -> None:
    torch.manual_seed(1)
    tensors = {}
    for tensor_map in family_of(CONFIG).tensors(CONFIG):
        for name, shape in zip(tensor_map.hf, tensor_map.hf_shapes(), strict=True):
            tensors[name] = initial(name, shape).to(torch.float32 if tensor_map.is_float32 else torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1))


if __name__ == "__main__":
    main()
