"""Small float32 students, trained and exported by our own jobs on two tensor-parallel ranks.

In float32 an engine and Megatron can be compared closely: in BF16, two correct implementations of W4A4 round inputs
differently, and a last bit may decide an NVFP4 code.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tiny_job
import torch
from example_modules import imports_of_examples
from fork_server import ForkServer
from launch import ROOT

LAYOUTS = ("modelopt", "compressed-tensors")
# vLLM's attention on a CPU has heads of 32, 64, ... Both sizes of TP2's shards are multiples of 16, NVFP4's block.
_SHAPE = tiny_job.LLAMA | {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
_SHAPE |= {"max_position_embeddings": 128, "torch_dtype": "float32"}  # exports have the declared dtype
FAMILIES = {
    "llama": _SHAPE,
    "qwen2": _SHAPE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": _SHAPE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}
RANDOM_PROMPTS, TEXT_PROMPTS = (4, 48), (4, 128)
"""Number of prompts and tokens per prompt."""
_COMMON = [
    *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--eval-iters", "0", "--split", "100,0,0"),
    *("--save-interval", "1000", "--qad-calibration-samples", "8", "--min-lr", "1e-4", "--no-save-optim"),
    *tiny_job.READ_HERE,
]
_NO_FACTOR = "import megatron_qad.formats.nvfp4_format as f; f.tie_free = lambda scale: scale\n"
_BF16_INPUTS = """
import megatron_qad.quantization.activations as a
from megatron_qad.formats.input_scales import round_up_to_bf16
from megatron_qad.formats.nvfp4_format import NVFP4Numbers

of_amax = NVFP4Numbers.input_scale_from_amax
NVFP4Numbers.input_scale_from_amax = lambda self, amax, **kwargs: of_amax(self, round_up_to_bf16(amax), **kwargs)
a.FakeQuantSTE.forward = staticmethod(lambda ctx, x, scale, quant: quant(x.bfloat16().float(), scale, check=False))
"""
VARIANTS = {"": "", "ties": _NO_FACTOR, "bf16": _BF16_INPUTS, "bf16-ties": _BF16_INPUTS + _NO_FACTOR}
"""Code that changes the arithmetic of inputs, to measure what the tie-free factor of input scales is for: "ties" takes
it away, "bf16" rounds inputs and their amaxes to bfloat16, as they are in BF16 models."""


@dataclass
class Student:
    """A trained student: its checkpoint, exports and prompts."""

    name: str
    run: Path
    prompts: np.ndarray
    """Token ids [n, s]."""
    flags: list[str]
    server: ForkServer

    def export(self, layout: str, variant: str = "") -> Path:
        """Return the directory of the export in a layout; ``export_all`` writes it."""
        return Path(f"{self.run}-{layout}{variant and '-' + variant}")

    def export_all(self, layouts: Sequence[str] = LAYOUTS, variant: str = "") -> None:
        """Export in several layouts, with the arithmetic of one of ``VARIANTS``."""
        outputs = {layout: str(self.export(layout, variant)) for layout in layouts}
        argv = [str(self.run), json.dumps(outputs)]
        code = "import json, sys, training_jobs; training_jobs.export_checkpoint(sys.argv[1], json.loads(sys.argv[2]))"
        self.server.run("script_jobs:code", 1, {"text": VARIANTS[variant] + code, "argv": argv})

    @cached_property
    def logprobs(self) -> np.ndarray:
        """Log-probabilities of the next token in Megatron, float32 [n, s, V]."""
        return self.logprobs_of(self.prompts)

    def logprobs_of(self, prompts: np.ndarray, variant: str = "") -> np.ndarray:
        """Run the student on two ranks, with the arithmetic of one of ``VARIANTS``.

        prompts: token ids [n, s], s even
        """
        asked, output = self.run / "prompts.npy", self.run / "logprobs.npy"
        np.save(asked, prompts)
        argv = ["--prompts", str(asked), "--output", str(output), "--qad-student", str(self.run), *self.flags]
        code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        argv = [str(ROOT / "tests/serve/student_logprobs.py"), *argv]
        self.server.run("script_jobs:code", 2, {"text": VARIANTS[variant] + code, "argv": argv})
        return np.load(output)


def train(server: ForkServer, directory: Path, name: str, prompts: np.ndarray, flags: Sequence[str]) -> Student:
    """Train and export the student ``name``, in float32 on two ranks."""
    flags, run = [*_COMMON, *flags], directory / name
    server.run("training_jobs:train", 2, {"argv": [*flags, "--save", str(run)]}, timeout=900)
    student = Student(name, run, prompts, flags, server)
    student.export_all()
    return student


def random_students(server: ForkServer, directory: Path) -> list[Student]:
    """Train one student per family from random weights on random tokens, for two steps."""
    directory.mkdir()
    models = []
    for seed, (family, config) in enumerate(FAMILIES.items()):
        source = tiny_job.write_hf(directory / f"hf-{family}", config, seed=seed)
        models.append((str(source), str(directory / f"teacher-{family}"), "float32"))
    tiny_job.write_data(directory / "data", vocab_size=_SHAPE["vocab_size"])
    server.run("training_jobs:import_checkpoints", 1, {"models": models})
    prompts = np.random.default_rng(1).integers(0, _SHAPE["vocab_size"], RANDOM_PROMPTS)
    flags = [
        *("--data-path", str(directory / "data"), "--data-cache-path", str(directory / "cache"), "--seq-length", "32"),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "2", "--lr", "1e-3"),
    ]
    return [
        train(server, directory, family, prompts, ["--qad-teacher", str(directory / f"teacher-{family}"), *flags])
        for family in FAMILIES
    ]


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>:{% endif %}"
)
MAX_NEW_TOKENS = 12
"""Length of an answer by the generation config of the text student."""


def text_student(server: ForkServer, directory: Path) -> Student:
    """Train a teacher on CPython's help and distill its NVFP4 student, as the demo does, in fewer and smaller steps."""
    with imports_of_examples("tiny_cpu"):
        import make_inputs

    directory.mkdir()
    hf = directory / "hf"
    make_inputs.write_texts(directory)
    config = FAMILIES["llama"] | {"num_hidden_layers": 3, "vocab_size": make_inputs.VOCAB_SIZE}
    tiny_job.write_hf(hf, config | {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2})
    make_inputs.write_tokenizer(directory / "raw.txt", hf / "tokenizer")
    tokenizer_config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    tokenizer_config |= {"unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    (hf / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    # vLLM does not read do_sample; with top_k of 1 it chooses the most likely token, at any temperature.
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "top_k": 1, "max_new_tokens": MAX_NEW_TOKENS}
    (hf / "generation_config.json").write_text(json.dumps(generation))
    server.run("training_jobs:import_checkpoints", 1, {"models": [(str(hf), f"{directory}/untrained", "float32")]})
    for text in ("raw", "heldout"):
        argv = ["--input", f"{directory}/{text}.txt", "--split-on", make_inputs.SEPARATOR, "--output"]
        argv += [f"{directory}/data_{text}", "--tokenizer", str(hf)]
        server.run("script_jobs:script", 1, {"path": "tools/prepare_data.py", "argv": argv})
    flags = [
        *("--data-path", f"{directory}/data_raw", "--data-cache-path", f"{directory}/cache", "--seq-length", "128"),
        *("--micro-batch-size", "4", "--global-batch-size", "8", "--lr-warmup-iters", "5"),
    ]
    teacher = ["--qad-loss", "ce", "--qad-policy", "bf16", "--qad-student", f"{directory}/untrained", *flags]
    teacher += ["--train-iters", "50", "--lr", "5e-3", "--save", f"{directory}/teacher"]
    server.run("training_jobs:train", 2, {"argv": [*_COMMON, *teacher]}, timeout=900)
    flags += ["--qad-teacher", f"{directory}/teacher", "--train-iters", "20", "--lr", "5e-4"]
    return train(server, directory, "text", _heldout_prompts(directory), flags)


def _heldout_prompts(directory: Path) -> np.ndarray:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    num_prompts, length = TEXT_PROMPTS
    dataset = IndexedDataset(f"{directory}/data_heldout")
    tokens = np.concatenate([dataset[i] for i in range(len(dataset))])
    return torch.from_numpy(tokens[: num_prompts * length].astype(np.int64)).view(num_prompts, length).numpy()
