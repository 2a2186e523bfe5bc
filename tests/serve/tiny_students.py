"""Makes tiny quantized students of several families with the project's own tools: import, PTQ job, export.

The weights are random and large enough that the distributions are far from uniform. The students are in float32 unless
a test says otherwise, so that engines can be compared without BF16's noise. All inner sizes are multiples of 128, the
block of INT4; llama.cpp's NVFP4 needs multiples of 64.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny_hybrids
import tiny_job
import tokenizers
import torch
import transformers
from fork_server import ForkServer
from prepared import write_prepared

from megatron_qad.data.tokenizer import load_tokenizer

VOCAB = 259
_SIZES = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
_SIZES |= {"head_dim": 32, "moe_intermediate_size": 128, "moe_shared_expert_intermediate_size": 128}
_SIZES |= {"bos_token_id": 257, "eos_token_id": 258}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
CONFIGS = {
    "llama": tiny_job.LLAMA | _SIZES,
    "qwen2": tiny_job.LLAMA | _QWEN2 | _SIZES,
    "qwen3": tiny_job.LLAMA | _QWEN3 | _SIZES,
    "qwen3_moe": tiny_hybrids.QWEN3_MOE | _SIZES,
    "nemotron_h": tiny_hybrids.NEMOTRON_H | _SIZES,
}
CONFIGS["nemotron_vl"] = {
    "architectures": ["NemotronH_Nano_VL_V2"],
    "model_type": "NemotronH_Nano_VL_V2",
    "auto_map": {"AutoConfig": "configuration.VisionLanguageConfig"},
    "llm_config": CONFIGS["nemotron_h"] | {"torch_dtype": "bfloat16"},
    "vision_config": {
        "patch_size": 16,
        "args": {
            "model": "vit_small_patch16_224",  # the smallest that vLLM knows
            "teachers": [{"name": "clip"}, {"name": "sam"}],
            "cls_token_per_teacher": True,
            "register_multiple": 10,
            "cpe_max_size": 128,
        },
    },
    "force_image_size": 64,
    "patch_size": 16,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "template": "",
    "image_tag_type": "internvl",
    "vit_hidden_size": 384,
    "projector_hidden_size": 256,
    "norm_mean": [0.48145466, 0.4578275, 0.40821073],
    "norm_std": [0.26862954, 0.26130258, 0.27577711],
}
REMOTE_CODE = """
from transformers import AutoConfig, PretrainedConfig


class VisionLanguageConfig(PretrainedConfig):
    model_type = "NemotronH_Nano_VL_V2"

    def __init__(self, llm_config=None, vision_config=None, **kwargs):
        self.llm_config = llm_config or {}
        self.text_config = AutoConfig.for_model(**{"model_type": "nemotron_h", **self.llm_config})
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        super().__init__(**kwargs)
"""
"""What a vision-language model of the Hub has as remote code, and vLLM needs to read its config."""
POLICIES = {
    "nvfp4": [],
    "head": ["head=nvfp4"],
    "fp8-head": ["head=fp8"],
    "mixed": ["attention=fp8"],
    "mixed-mamba": ["attention+mamba=fp8"],
    "kv-fp8": ["kv_cache=fp8"],
    "mixed-kv-fp8": ["attention=fp8", "kv_cache=fp8"],
    "w4a16": ["attention+mamba+mlp+expert+shared_expert=nvfp4-w4a16"],
    "fp8": ["attention+mamba+mlp+expert+shared_expert=fp8"],
    "int4": ["attention+mamba+mlp+expert+shared_expert=int4-w4a16"],
}
"""Rules after those of nvfp4-all-linear, by the name of the policy in tests and in the support table."""


@dataclass(frozen=True)
class Students:
    """Directory of students, and the server that runs the tools."""

    directory: Path
    server: ForkServer
    dtype: str = "float32"
    """Dtype of the exports' unquantized tensors."""

    def prepare(self, families: list[str]) -> None:
        """Write and import the models of some families, and the data of their calibration."""
        models = []
        for family in families:
            source = tiny_job.write_hf(self.directory / f"hf-{family}", CONFIGS[family] | {"torch_dtype": self.dtype})
            byte_tokenizer().save_pretrained(source)
            if "auto_map" in CONFIGS[family]:
                (source / "configuration.py").write_text(REMOTE_CODE)
            models.append((str(source), f"{self.directory}/imported-{family}", "float32"))
        rng = np.random.default_rng(0)
        documents = [rng.integers(0, 256, size=40) for _ in range(40)]
        write_prepared(self.directory / "data", documents, tokenizer=load_tokenizer(models[0][0]))
        self.server.run("training_jobs:import_checkpoints", 1, {"models": models})

    def quantize(self, family: str, policy: str) -> Path:
        """Run the PTQ job of a family under a policy, or return the one that ran before."""
        run = self.directory / f"run-{family}-{policy}"
        if run.exists():
            return run
        model, where = f"{self.directory}/imported-{family}", self.directory
        rules = ["--qad-policy-override", *POLICIES[policy]] if POLICIES[policy] else []
        argv = [
            *("--qad-ptq", "--qad-teacher", model, "--qad-student", model, "--save", str(run), *rules),
            *("--data-path", f"{where}/data", "--data-cache-path", f"{where}/cache", "--split", "80,20,0"),
            *("--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "8", "--eval-iters", "1"),
            *("--qad-calibration-samples", "8", *tiny_job.READ_HERE),
        ]
        self.server.run("training_jobs:train", 1, {"argv": argv})
        return run

    def export(self, family: str, policy: str, layout: str) -> Path:
        """Export a student, or return the export that was made before."""
        output = self.directory / f"{family}-{policy}-{layout}"
        if not output.exists():
            arguments = {"checkpoint": str(self.quantize(family, policy)), "outputs": {layout: str(output)}}
            self.server.run("training_jobs:export_checkpoint", 1, arguments)
        return output


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a BPE tokenizer of bytes, two special tokens and a merge, without which llama.cpp does not load it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "he", "<s>", "</s>"])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("h", "e")]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def tokens(num_rows: int = 4, length: int = 48) -> torch.Tensor:
    """Return random ids of byte tokens, int64 [num_rows, length]."""
    return torch.randint(0, 256, (num_rows, length), generator=torch.Generator().manual_seed(5))


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())
