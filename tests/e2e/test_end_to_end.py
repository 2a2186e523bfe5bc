"""End-to-end test through the command lines: Hugging Face BF16, import, QAD on two ranks, export, validation.

The weights of the checkpoint, those of the exporter and those that modelopt packs from the same tensors must be
bitwise equal.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
# train-iters is not a multiple of save-interval, so the last save directly follows an optimizer step, without a
# validation between them, and the checkpoint has the weights before the next quantization.
TRAIN = """
tensor_model_parallel_size: 2
sequence-parallel: true
bf16: true
use-distributed-optimizer: true
seq-length: 64
micro-batch-size: 2
global-batch-size: 4
train-iters: 4
save-interval: 100
eval-iters: 1
lr: 1.0e-3
min-lr: 1.0e-4
log-interval: 1
split: 90,10,0
qad-calibration-samples: 4
qad-weight-scale-rule: max  # the tests compute the scales from the last weights, as modelopt does
"""


def run(*command) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def script(server):
    """``script(path, argument, ...)``: run a command line in a forked process that has its imports (faster)."""

    def call(path: str, *argv, fails: bool = False) -> str:
        arguments = {"path": path, "argv": [str(argument) for argument in argv]}
        return server.run("script_jobs:script", 1, arguments, fails=fails)

    return call


@pytest.fixture(scope="module")
def job(tmp_path_factory, script) -> Path:
    """Directory with an HF model, its import, data, four steps of QAD, and the exports."""
    d = tmp_path_factory.mktemp("end_to_end")
    torch.manual_seed(3)
    shape = dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = LlamaConfig(vocab_size=300, max_position_embeddings=128, tie_word_embeddings=False, **shape)
    LlamaForCausalLM(config).bfloat16().save_pretrained(d / "hf")
    declared = json.loads((d / "hf" / "config.json").read_text())
    del declared["dtype"]  # some models on the Hub declare none
    (d / "hf" / "config.json").write_text(json.dumps(declared))
    (d / "text.txt").write_text("\n".join(f"the number {i} is followed by {i + 1}" for i in range(900)))
    import sentencepiece

    options = {
        "vocab_size": 300,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(d / "text.txt"), model_prefix=str(d / "hf" / "tokenizer"), **options
    )
    (d / "train.yaml").write_text(TRAIN)
    run("tools/import_hf.py", "--hf-model", d / "hf", "--output", d / "teacher")
    # One document per line, because every part of the split needs documents.
    (d / "lines.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} comes before {i + 1} " * 20}) + "\n" for i in range(60))
    )
    tokenizer = d / "hf" / "tokenizer.model"
    run("tools/prepare_data.py", "--input", d / "lines.jsonl", "--tokenizer", tokenizer, "--output", d / "data")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "pretrain_qad.py")
    qad = ("--config", d / "train.yaml", "--qad-teacher", d / "teacher", "--data-path", d / "data", "--save", d / "run")
    (d / "log.txt").write_text(run(*launch, *qad, "--tensorboard-dir", d / "run" / "tensorboard"))
    for layout, call in {"modelopt": run, "compressed-tensors": script, "bf16": script}.items():
        call("tools/export_hf.py", "--checkpoint", d / "run", "--output", d / layout, "--layout", layout)
    return d


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


SAVED = """
import sys
from safetensors.torch import save_file
from megatron_qad.checkpoint.hf_reader import read_json
from megatron_qad.checkpoint.torch_dist import TorchDistReader
from megatron_qad.models.families import family_of
from megatron_qad.engine.distributed import init_process_group
from pathlib import Path
run, target = map(Path, sys.argv[1:])
init_process_group()
config = read_json(run / "hf" / "config.json")
layers = TorchDistReader(run).layers(family_of(config).tensors(config))
save_file({n: p.contiguous() for m, t in layers for n, p in zip(m.hf, m.to_hf(t))}, target / "model.safetensors")
"""


@pytest.fixture(scope="module")
def saved(job, server) -> dict[str, torch.Tensor]:
    """The checkpoint's weights as stored, with Hugging Face names."""
    (job / "saved").mkdir()
    server.run("script_jobs:code", 1, {"text": SAVED, "argv": [str(job / "run"), str(job / "saved")]})
    return tensors(job / "saved")


@pytest.fixture(scope="module")
def in_place(job, saved) -> dict[str, torch.Tensor]:
    """The checkpoint's weights as the next training step would use them: fake-quantized per Megatron tensor (q, k, v
    fused; gate, up fused)."""
    from megatron_qad.formats import nvfp4
    from megatron_qad.models.families import family_of

    config = json.loads((job / "hf" / "config.json").read_text())
    weights = {}
    for tensor_map in family_of(config).tensors(config):
        parts = [saved[name] for name in tensor_map.hf]
        if tensor_map.is_linear and tensor_map.kind != "head":
            scale = nvfp4.global_scale_from_amax(torch.stack([nvfp4.tensor_amax(p) for p in parts]).amax())
            parts = [nvfp4.fake_quant(p, scale) for p in parts]
        weights |= dict(zip(tensor_map.hf, parts, strict=True))
    return weights


def test_bf16_export_has_the_in_place_weights(job, saved, in_place):
    exported = tensors(job / "bf16")
    assert exported.keys() == in_place.keys()
    assert all(torch.equal(exported[name], in_place[name]) for name in in_place)
    changed = [name for name in saved if not torch.equal(saved[name], exported[name])]
    assert len(changed) == 2 * 7, "the export must quantize exactly the linears of the two blocks"


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_exports_are_valid(job, script, layout):
    call = run if layout == "modelopt" else script
    assert ": valid" in call("tools/validate_nvfp4.py", job / layout, "--against", job / "hf")


def test_exported_weights_decode_to_the_in_place_weights(job, in_place):
    from megatron_qad.formats import nvfp4

    stored = tensors(job / "modelopt")
    quantized = [name.removesuffix("_scale_2") for name in stored if name.endswith("weight_scale_2")]
    assert len(quantized) == 2 * 7  # q, k, v, o, gate, up, down of two blocks
    for name in quantized:
        decoded = nvfp4.dequantize(stored[name], stored[f"{name}_scale"], stored[f"{name}_scale_2"], torch.bfloat16)
        assert torch.equal(decoded, in_place[name]), name
    for name in set(in_place) - set(quantized):
        assert torch.equal(stored[name], in_place[name]), name


def test_exported_bytes_match_modelopt(job, saved):
    """modelopt packs the checkpoint's tensor. (Packing the fake-quantized tensor could give other signs of zero: small
    negative weights have become zeros without sign.)"""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    stored, weights = tensors(job / "modelopt"), saved
    for name in (n.removesuffix("_scale_2") for n in stored if n.endswith("weight_scale_2")):
        quantized, scale, _ = NVFP4QTensor.quantize(
            weights[name].float(), 16, weights_scaling_factor_2=stored[f"{name}_scale_2"], try_tensorrt=False
        )
        assert torch.equal(quantized._quantized_data, stored[name]), name
        assert torch.equal(scale.view(torch.uint8), stored[f"{name}_scale"].view(torch.uint8)), name


def test_both_layouts_have_the_same_bytes(job):
    modelopt, compressed = tensors(job / "modelopt"), tensors(job / "compressed-tensors")
    for name in (n.removesuffix("_scale_2") for n in modelopt if n.endswith("weight_scale_2")):
        assert torch.equal(modelopt[name], compressed[f"{name}_packed"])
        assert torch.equal(modelopt[f"{name}_scale"].view(torch.uint8), compressed[f"{name}_scale"].view(torch.uint8))
        assert compressed[f"{name}_global_scale"].item() == (1 / modelopt[f"{name}_scale_2"]).item()


def test_kl_of_the_loaded_export_matches_validation(job):
    """KL(teacher || export), both in transformers, matches the reported validation KL within a third: the tokens are
    different but similar, and BF16 rounds elsewhere. A wrongly scaled export would be far outside."""
    line = [line for line in (job / "log.txt").read_text().splitlines() if "kl_to_teacher" in line][-1]
    reported = float(line.split("kl_to_teacher: ")[1].split()[0])
    from megatron_qad.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(job / "hf" / "tokenizer.model"))
    tokens = tokenizer.encode("".join(f"{i} comes before {i + 1} " * 20 for i in range(30)))[: 16 * 64]
    tokens = torch.tensor(tokens).view(16, 64)
    with torch.inference_mode():
        log_p, log_q = (
            AutoModelForCausalLM.from_pretrained(job / name, dtype=torch.bfloat16)(tokens)
            .logits.float()
            .log_softmax(-1)
            for name in ("hf", "compressed-tensors")
        )
    measured = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert measured == pytest.approx(reported, rel=1 / 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_packed_weights_generate_in_both_dtypes(job, in_place, tmp_path, dtype):
    """compressed-tensors decompresses to BF16 whatever is asked for; products with float32 inputs failed."""
    from megatron_qad.data.generate import GenerateOptions, write_documents
    from megatron_qad.data.local_generation import LocalModel, load_model

    directory = job / "compressed-tensors"
    model, _ = load_model(directory, dtype, "cpu")
    projection = model.model.layers[0].mlp.down_proj
    assert projection.weight.dtype == getattr(torch, dtype)
    # Within BF16's rounding of the decompressed product of code and scale, 2^-8.
    expected = in_place["model.layers.0.mlp.down_proj.weight"].float()
    torch.testing.assert_close(projection.weight.float(), expected, rtol=2**-8, atol=0)
    options = GenerateOptions(num_documents=2, max_new_tokens=4, batch_size=2, dtype=dtype)
    assert write_documents(LocalModel(directory, None, options), tmp_path / "own.jsonl", 2) == 2


def test_export_never_overwrites(job, script):
    output = script("tools/export_hf.py", "--checkpoint", job / "run", "--output", job / "modelopt", fails=True)
    assert output.strip().splitlines()[-1].startswith("error: ")
