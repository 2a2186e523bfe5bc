"""Text generation with tiny random models: output lines, resuming, and use in prepare_data."""

import json
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

from megatron_qad.data.generate import GenerateOptions, write_documents
from megatron_qad.data.local_generation import LocalModel
from megatron_qad.data.prepare import PrepareOptions, prepare_data
from megatron_qad.data.prompts import read_prompts
from megatron_qad.engine.errors import QADError

OPTIONS = GenerateOptions(num_documents=6, max_new_tokens=12, batch_size=2, seed=5, dtype="float32")


def generate_documents(directory, prompts, output, options):
    return write_documents(LocalModel(directory, prompts, options), output, options.num_documents)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, hf_tokenizer):
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=hf_tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=hf_tokenizer.bos,
        eos_token_id=hf_tokenizer.eod,
    )
    model = LlamaForCausalLM(config)
    # Flatter logits: otherwise EOS would be too rare to test "finish": "eos".
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    return write(directory, model, hf_tokenizer)


def write(directory, model, hf_tokenizer):
    model.save_pretrained(directory)
    hf_tokenizer.hf.save_pretrained(directory)
    return directory


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_documents_from_bos_can_be_prepared(model_dir, tmp_path, prepared, hf_dir):
    path = tmp_path / "own.jsonl"
    assert generate_documents(model_dir, None, path, OPTIONS) == 6
    lines = read(path)
    assert len(lines) == 6 and all(set(line) == {"text", "finish"} for line in lines)
    assert len({line["text"] for line in lines}) == 6, "batches must not repeat each other"
    _, metadata = prepared(str(path), hf_dir)
    assert metadata.documents == 6 and metadata.bad_lines == 0


def test_prompts_become_chats(model_dir, tmp_path, prepared, hf_dir):
    (tmp_path / "prompts.txt").write_text("Short?\n\nA much longer question than the other one?\n", encoding="utf-8")
    prompts = read_prompts(tmp_path / "prompts.txt")
    assert len(prompts) == 2
    generate_documents(model_dir, prompts, tmp_path / "chats.jsonl", OPTIONS)
    lines = read(tmp_path / "chats.jsonl")
    assert [line["messages"][0]["content"] for line in lines] == prompts * 3
    assert all(line["messages"][1]["role"] == "assistant" for line in lines)
    _, metadata = prepared(str(tmp_path / "chats.jsonl"), hf_dir)
    assert metadata.chat_documents == 6


def test_killed_run_resumes_with_the_same_text(model_dir, tmp_path):
    generate_documents(model_dir, None, tmp_path / "complete.jsonl", OPTIONS)
    complete = (tmp_path / "complete.jsonl").read_bytes()
    generate_documents(model_dir, None, tmp_path / "cut.jsonl", OPTIONS)
    third_line = complete.index(b"\n", complete.index(b"\n") + 1) + 1
    # Three lines and part of a fourth, as if killed while writing the second batch.
    fourth_line = complete.index(b"\n", third_line) + 1
    (tmp_path / "cut.jsonl").write_bytes(complete[: fourth_line + 5])
    assert generate_documents(model_dir, None, tmp_path / "cut.jsonl", OPTIONS) == 4
    assert (tmp_path / "cut.jsonl").read_bytes() == complete
    assert generate_documents(model_dir, None, tmp_path / "cut.jsonl", OPTIONS) == 0


def test_sigkill_leaves_no_gap_and_no_duplicate(model_dir, tmp_path):
    """The tool is killed while it writes; a second call completes the file as if nothing had happened."""
    tool = Path(__file__).resolve().parents[3] / "tools" / "generate_data.py"
    output, size = tmp_path / "own.jsonl", ["--num-documents", "100", "--max-new-tokens", "8"]
    arguments = [*size, "--batch-size", "2", "--seed", "5", "--dtype", "float32", "--device", "cpu"]
    command = [sys.executable, str(tool), "--model", str(model_dir), "--output", str(output), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not output.is_file() or output.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    written = output.read_bytes().count(b"\n")
    assert 5 <= written < 100, "the tool was not killed while it wrote"
    options = GenerateOptions(num_documents=100, max_new_tokens=8, batch_size=2, seed=5, dtype="float32")
    assert generate_documents(model_dir, None, output, options) == 100 - written + written % 2
    generate_documents(model_dir, None, tmp_path / "complete.jsonl", options)
    assert output.read_bytes() == (tmp_path / "complete.jsonl").read_bytes()


def test_other_weights_at_the_same_path_are_an_error(model_dir, tmp_path):
    copy = Path(shutil.copytree(model_dir, tmp_path / "model"))
    generate_documents(copy, None, tmp_path / "a.jsonl", OPTIONS)
    more = GenerateOptions(**{**vars(OPTIONS), "num_documents": 8})
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"][3, 3] += 0.001
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QADError, match=r"model files \(model.safetensors\) differ"):
        generate_documents(copy, None, tmp_path / "a.jsonl", more)
    # The same files at another path are the same model.
    moved = shutil.copytree(model_dir, tmp_path / "moved")
    assert generate_documents(moved, None, tmp_path / "a.jsonl", more) == 2


def test_prompts_with_fields(model_dir, tmp_path, hf_tokenizer):
    prompts = tmp_path / "problems.jsonl"
    chat = [{"role": "system", "content": "Count."}, {"role": "user", "content": "Three?"}]
    prompts.write_text(
        json.dumps({"prompt": "2+2?", "answer": 4, "id": "a"}) + "\n\n" + json.dumps({"messages": chat, "answer": 3})
    )
    generate_documents(model_dir, read_prompts(prompts), tmp_path / "answers.jsonl", OPTIONS)
    lines = read(tmp_path / "answers.jsonl")
    assert [(line["answer"], line.get("id")) for line in lines[:2]] == [(4, "a"), (3, None)]
    assert lines[0]["messages"][0] == {"role": "user", "content": "2+2?"} and lines[1]["messages"][:2] == chat
    for text, message in (
        ("{", "line 1"),
        ('{"prompt": 3}', "expected a string"),
        ('{"prompt": "a", "messages": []}', "either"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing to answer"),
        ('{"prompt": "a", "finish": "eos"}', "cannot also have finish"),
        ("[]", "either"),
    ):
        prompts.write_text(text)
        with pytest.raises(QADError, match=message):
            read_prompts(prompts)


def test_random_tokens_are_prepared_as_they_are(hf_dir, tmp_path, hf_tokenizer, monkeypatch, capsys):
    tool = Path(__file__).resolve().parents[3] / "tools" / "generate_data.py"
    output = tmp_path / "random.jsonl"
    arguments = ["--model", str(hf_dir), "--random-tokens", "--num-documents", "50", "--max-new-tokens", "64"]
    monkeypatch.setattr(sys, "argv", [str(tool), *arguments, "--output", str(output), "--device", "cpu"])
    runpy.run_path(str(tool), run_name="__main__")
    ids = [line["input_ids"] for line in read(output)]
    drawn = {id_ for document in ids for id_ in document}
    allowed = set(hf_tokenizer.vocab.values()) - hf_tokenizer.special
    assert drawn <= allowed and len(drawn) > 0.9 * len(allowed)  # of 3,200 draws
    prepare_data(PrepareOptions(inputs=[str(output)], tokenizer=str(hf_dir), output=str(tmp_path / "data")))
    data = IndexedDataset(str(tmp_path / "data"))
    assert [data[i].tolist() for i in range(50)] == [[*document, hf_tokenizer.eod] for document in ids]
    complete = output.read_bytes()
    output.write_bytes(complete[: len(complete) // 2])
    runpy.run_path(str(tool), run_name="__main__")
    assert output.read_bytes() == complete


def test_sampling_settings_of_generation_config_are_ignored(model_dir, tmp_path):
    """transformers would apply the repetition penalty of generation_config.json, which Qwen2.5 has, for example."""
    changed = Path(shutil.copytree(model_dir, tmp_path / "changed"))
    config = json.loads((changed / "generation_config.json").read_text())
    # The logits of this model are near 0, so only a strong penalty would change some of the few tokens.
    settings = {"repetition_penalty": 0.001, "top_k": 2, "do_sample": True, "min_length": 9}
    (changed / "generation_config.json").write_text(json.dumps(config | settings))
    for directory, name in ((model_dir, "a"), (changed, "b")):
        generate_documents(directory, None, tmp_path / f"{name}.jsonl", OPTIONS)
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.jsonl")


def test_resuming_with_other_settings_is_an_error(model_dir, tmp_path):
    generate_documents(model_dir, None, tmp_path / "a.jsonl", OPTIONS)
    other = GenerateOptions(**{**vars(OPTIONS), "seed": 6, "num_documents": 8})
    with pytest.raises(QADError, match="other settings: seed differ"):
        generate_documents(model_dir, None, tmp_path / "a.jsonl", other)


def test_invalid_options_and_prompts_are_errors(model_dir, tmp_path):
    with pytest.raises(QADError, match="temperature must be above 0"):
        generate_documents(model_dir, None, tmp_path / "x", GenerateOptions(num_documents=1, temperature=0))
    with pytest.raises(QADError, match="not a directory"):
        generate_documents(tmp_path / "nowhere", None, tmp_path / "x", OPTIONS)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(QADError, match="has no prompt"):
        read_prompts(tmp_path / "empty.txt")


def test_prompts_are_split_at_newlines_only(tmp_path):
    """str.splitlines() would also split at characters that may occur inside a prompt."""
    prompts = ["one\u2028prompt", "one\x85prompt", "one\x0b\x0c\x1cprompt", "one\rprompt"]
    (tmp_path / "prompts.txt").write_bytes("\r\n".join(["", *prompts, ""]).encode())
    assert read_prompts(tmp_path / "prompts.txt") == prompts


def test_model_with_pickled_weights_is_rejected(model_dir, tmp_path):
    """transformers would otherwise fall back to pytorch_model.bin."""
    pickled = Path(shutil.copytree(model_dir, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(QADError, match="transformers cannot load it.*safetensors"):
        generate_documents(pickled, None, tmp_path / "own.jsonl", OPTIONS)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("chat_template.jinja", "{% for m in %}", "chat template or the tokenizer of .* failed: TemplateSyntaxError"),
        ("chat_template.jinja", "{{ raise_exception('no') }}", "failed: TemplateError: no"),
        ("tokenizer.json", '{"model": 3}', "transformers cannot load its tokenizer"),
    ],
)
def test_failures_of_templates_and_tokenizers_are_errors(model_dir, tmp_path, file, content, message):
    damaged = Path(shutil.copytree(model_dir, tmp_path / "damaged"))
    (damaged / file).write_text(content)
    with pytest.raises(QADError, match=message):
        generate_documents(damaged, ["Why?"], tmp_path / "out.jsonl", OPTIONS)


def test_the_command_line(model_dir, tmp_path, monkeypatch, capsys):
    tool = Path(__file__).resolve().parents[3] / "tools" / "generate_data.py"
    arguments = ["--model", str(model_dir), "--output", str(tmp_path / "o.jsonl"), "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", [str(tool), *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit, match="--num-documents is needed"):
        runpy.run_path(str(tool), run_name="__main__")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--num-documents", "1"])
    runpy.run_path(str(tool), run_name="__main__")
    assert len(read(tmp_path / "o.jsonl")) == 1
    assert "o.jsonl: 1 document written, 1 in total" in capsys.readouterr().out


def test_cached_generation_of_a_hybrid_matches_uncached_passes(tmp_path, hf_tokenizer):
    """transformers 5.14 has no cache type for MLP layers; ``generate`` registers one."""
    torch.manual_seed(0)
    config = NemotronHConfig(
        hybrid_override_pattern="M-*E",
        vocab_size=hf_tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        n_routed_experts=4,
        moe_intermediate_size=16,
        moe_shared_expert_intermediate_size=16,
        bos_token_id=hf_tokenizer.bos,
        eos_token_id=hf_tokenizer.eod,
    )
    model = NemotronHForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.dim() > 1 else 1)  # clear maxima
    directory = write(tmp_path / "model", model, hf_tokenizer)
    nearly_greedy = GenerateOptions(num_documents=2, max_new_tokens=10, batch_size=2, temperature=1e-4, dtype="float32")
    generate_documents(directory, None, tmp_path / "own.jsonl", nearly_greedy)
    ids = torch.tensor([[hf_tokenizer.bos]])
    while ids.shape[1] < 11 and ids[0, -1] != hf_tokenizer.eod:
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    written = [token for token in ids[0, 1:].tolist() if token != hf_tokenizer.eod]
    assert len(set(written)) > 1
    expected = hf_tokenizer.hf.decode(written, clean_up_tokenization_spaces=False)
    assert [line["text"] for line in read(tmp_path / "own.jsonl")] == [expected] * 2
