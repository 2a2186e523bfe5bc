"""The script of the recipes, on one rank with a tiny model: from a Hugging Face model and text to a report."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
TRAINING = """
seq-length: 32
global-batch-size: 2
train-iters: 4
eval-interval: 2
save-interval: 2
eval-iters: 2
lr: 1.0e-3
min-lr: 1.0e-4
lr-warmup-iters: 1
qad-calibration-samples: 4
num-workers: 0
"""


def write_model(directory: Path) -> None:
    """A random Llama with a tokenizer of words."""
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(directory)


@pytest.mark.all
@pytest.mark.timeout(2400)
def test_script_goes_from_a_model_to_a_report_and_skips_finished_steps(tmp_path):
    write_model(tmp_path / "hf")
    # Long enough for validation documents, which a hash of the text chooses: 1 % of 1500.
    lines = [f"{i} comes before {i + 1} and after {i - 1} in the list" for i in range(1500)]
    (tmp_path / "chats.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "training.yaml").write_text(TRAINING)
    (tmp_path / "tiny" / "one_rank.yaml").write_text("tensor-model-parallel-size: 1\n")
    command = [ROOT / "examples/recipes/run.sh", "tiny/one_rank.yaml", "hf", "chats.jsonl", "work"]
    outputs = []
    for _ in range(2):
        environment = {**os.environ, "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
        outputs.append(done.stdout)
        print(done.stdout)
    work = tmp_path / "work"
    assert outputs[0].endswith("vllm serve work/hf-modelopt\n") and "report: work/report/report.html" in outputs[0]
    assert (work / "report" / "report.html").is_file() and (work / "hf-modelopt" / "model.safetensors").is_file()
    printed = ["training    4 iterations", "megatron_qad validation", "# Selected: iteration", "valid; layout modelopt"]
    for text in printed:
        assert text in outputs[0], text
    assert " qad (log:" in outputs[0] and " qad: done before" in outputs[1]
    assert " import (log:" in outputs[0] and " import: done before" in outputs[1]
