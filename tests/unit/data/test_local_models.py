"""Model directories of others: nothing is loaded from outside, and each damaged file is one error."""

import inspect
import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import hub_kernels

from megatron_qad.data.generate import GenerateOptions, write_documents
from megatron_qad.data.local_generation import LocalModel
from megatron_qad.data.tokenizer import load_tokenizer
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.local_models import local_config

OPTIONS = GenerateOptions(num_documents=1, max_new_tokens=2, batch_size=1, dtype="float32")


def generate_documents(directory, prompts, output, options):
    return write_documents(LocalModel(directory, prompts, options), output, options.num_documents)


KERNEL = "kernels-community/flash-attn"


@pytest.fixture(scope="module")
def complete(tmp_path_factory, hf_tokenizer):
    directory = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": hf_tokenizer.bos, "eos_token_id": hf_tokenizer.eod}
    LlamaForCausalLM(LlamaConfig(vocab_size=hf_tokenizer.vocab_size, **sizes, **ends)).save_pretrained(directory)
    hf_tokenizer.hf.save_pretrained(directory)
    return directory


@pytest.fixture
def model_dir(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "model")


def change(directory, file="config.json", **changes):
    content = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(content | changes))


def refuses(directory, message):
    with pytest.raises(QADError, match=message) as raised:
        generate_documents(directory, None, directory.parent / "out.jsonl", OPTIONS)
    assert "\n" not in str(raised.value)


def test_transformers_alone_follows_a_config_to_the_hub(model_dir):
    """The package `kernels` is not installed here; the error shows that transformers asked for it."""
    change(model_dir, attn_implementation=KERNEL)
    with pytest.raises(ImportError, match="`kernels` is either not installed"):
        AutoModelForCausalLM.from_pretrained(model_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": KERNEL},
        {"_attn_implementation": KERNEL},
        {"_attn_implementation_internal": KERNEL},
        {"attn_implementation": {"": KERNEL}},
        {"attn_implementation": {"text_config": KERNEL}},
        {"attn_implementation": f"paged|{KERNEL}"},
        {"attn_implementation": "someone/else:function"},
        {"attn_implementation": 5},
        {"experts_implementation": KERNEL},
        {"_experts_implementation": KERNEL},
        {"text_config": {"attn_implementation": KERNEL}},
        {"per_layer_config": {"0": {"attn_implementation": "flash_attention_2"}}},
    ],
    ids=str,
)
def test_implementations_from_the_hub_are_refused(model_dir, changes):
    change(model_dir, **changes)
    refuses(model_dir, "config.json: .*_implementation.* is .*, which would load code from outside the directory")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", [None, "eager", "flash_attention_2", "flash_attention_3"])
def test_other_implementations_are_left_to_transformers(model_dir, key, value):
    change(model_dir, **{key: value, "experts_implementation": "grouped_mm"})
    config = local_config(model_dir)
    assert config._attn_implementation is None and config._experts_implementation is None
    model = AutoModelForCausalLM.from_pretrained(model_dir, config=config, dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"


def test_kernels_of_the_hub_are_off(model_dir, monkeypatch):
    monkeypatch.setenv("USE_HUB_KERNELS", "YES")
    local_config(model_dir)
    assert os.environ["USE_HUB_KERNELS"] == "NO"
    assert 'os.environ.get("USE_HUB_KERNELS"' in inspect.getsource(hub_kernels)  # transformers still reads it


def test_code_of_a_model_is_not_run(model_dir):
    (model_dir / "evil.py").write_text("raise SystemExit('ran')")
    change(model_dir, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    assert (
        generate_documents(model_dir, None, model_dir.parent / "known.jsonl", OPTIONS) == 1
    )  # transformers' own class
    change(model_dir, model_type="evil", trust_remote_code=True)
    refuses(model_dir, "model_type 'evil' needs the code of its auto_map, which is never run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unknown"}, "transformers cannot load it: ValueError"),
        ({"vocab_size": "120"}, "transformers cannot load it: "),
        ({"dtype": "evil"}, "transformers cannot load it: "),
        ({"num_attention_heads": 0}, "transformers cannot load it: "),
        ({"rope_parameters": [1]}, "transformers cannot load it: "),
    ],
)
def test_damaged_config_is_one_error(model_dir, changes, message):
    change(model_dir, **changes)
    refuses(model_dir, message)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500, b"\xff\xfe", b"{", b"[]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_damaged_json_files_are_one_error(model_dir, name, content):
    (model_dir / name).write_bytes(content)
    refuses(model_dir, f"{name}: (its JSON is nested too deeply|not UTF-8|not valid JSON|expected a JSON object)")
    with pytest.raises(QADError, match=f"{name}: "):
        load_tokenizer(model_dir)


@pytest.mark.parametrize("ends", ["2", [[2]], 1.5, {"a": 1}, [True]])
def test_end_ids_must_be_integers(model_dir, ends):
    change(model_dir, "generation_config.json", eos_token_id=ends)
    refuses(model_dir, "eos_token_id|transformers cannot load it")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"{", b"[1]"])
def test_damaged_settings_of_a_resumed_output_are_one_error(model_dir, content):
    output = model_dir.parent / "out.jsonl"
    generate_documents(model_dir, None, output, OPTIONS)
    (model_dir.parent / "out.jsonl.settings.json").write_bytes(content)
    refuses(model_dir, "out.jsonl.settings.json: .*Choose another output file|not UTF-8")


def test_path_without_config_says_what_it_is_instead(tmp_path):
    (tmp_path / "checkpoint" / "hf").mkdir(parents=True)
    (tmp_path / "checkpoint" / "hf" / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    expected = {
        "checkpoint": f"The directory is a Megatron checkpoint; config and tokenizer of its model are in {tmp_path}/ch",
        "model.safetensors": "The path is a file.",
        "org/model": "The path does not exist; names on the Hub are not downloaded.",
    }
    for name, reason in expected.items():
        with pytest.raises(QADError, match=f"{name}: no config.json. Give a Hugging Face directory .* {reason}"):
            local_config(tmp_path / name)


def test_checkpoint_given_as_tokenizer_names_the_tokenizer_directory(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(
        QADError, match=f"has no tokenizer file; .* The tokenizer of this checkpoint is in {tmp_path}/hf"
    ):
        load_tokenizer(tmp_path)
