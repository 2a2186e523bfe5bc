"""Which files of a model directory are read: several sets of weights, damaged indexes, links that lead out of it."""

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_qad.checkpoint import model_directory
from megatron_qad.checkpoint.hf_reader import ASSETS, HFReader
from megatron_qad.engine.errors import QADError

sys.path.append(str(Path(__file__).parents[2] / "dist"))  # tiny_models

import tiny_models  # noqa: E402

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "saved"
    tiny_models.make("llama", directory, torch.bfloat16)
    return directory


@pytest.fixture
def model(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def shard(model: Path, num_shards: int = 2) -> dict:
    """Split model.safetensors into shards with an index; return the index."""
    weights, weight_map = load_file(model / SINGLE), {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[i::num_shards]}
        save_file(part, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (model / SINGLE).unlink()
    return write_index(model, weight_map)


def write_index(model: Path, weight_map) -> dict:
    index = {"metadata": {}, "weight_map": weight_map}
    (model / INDEX).write_text(json.dumps(index))
    return index


def norm_by_transformers(model: Path) -> torch.Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).model.norm.weight


def refuses(model: Path, pattern: str) -> None:
    with pytest.raises(QADError, match=pattern):
        HFReader(model)


def test_shards_are_read_as_one_file_is(model, saved):
    shard(model)
    reader, whole = HFReader(model), HFReader(saved)
    assert reader.names == whole.names and len(whole.names) > 10
    assert all(torch.equal(reader.read(name), whole.read(name)) for name in whole.names)


def test_single_file_next_to_an_index_is_ambiguous(model):
    """transformers takes the single file, vLLM the files of the index."""
    newer = {name: tensor * 2 for name, tensor in load_file(model / SINGLE).items()}
    shard(model)
    save_file(newer, model / SINGLE, metadata={"format": "pt"})
    assert torch.equal(norm_by_transformers(model), newer[NORM])
    refuses(
        model, f"loaders disagree: transformers reads {SINGLE}, vLLM reads the files of {INDEX} .model-00001-of-00002"
    )


def test_index_that_lists_the_single_file_is_accepted(model):
    write_index(model, dict.fromkeys(load_file(model / SINGLE), SINGLE))
    assert NORM in HFReader(model).names


def test_two_files_without_an_index(model):
    weights = load_file(model / SINGLE)
    other = model / "extra.safetensors"
    save_file({"x": torch.ones(2)}, other)
    refuses(model, f"loaders disagree: transformers reads {SINGLE} alone, vLLM reads extra.safetensors as well")
    other.unlink()
    (model / SINGLE).rename(model / "model-00001-of-00002.safetensors")
    assert HFReader(model).names == set(weights)
    second = model / "model-00002-of-00002.safetensors"
    save_file({NORM: weights[NORM]}, second)
    assert HFReader(model).names == set(weights)  # the same tensor twice
    save_file({NORM: weights[NORM] * 2}, second)
    refuses(
        model, f"{NORM} is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors with different"
    )


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "consolidated.safetensors", "model.fp16.safetensors", "original/x.safetensors"],
)
def test_files_that_loaders_ignore_are_ignored(model, saved, name):
    (model / name).parent.mkdir(exist_ok=True)
    save_file({NORM: torch.zeros(144)}, model / name)
    assert torch.equal(norm_by_transformers(model), HFReader(saved).read(NORM))
    assert torch.equal(HFReader(model).read(NORM), HFReader(saved).read(NORM))
    assert HFReader(model).names == HFReader(saved).names


def test_shards_that_the_index_does_not_list_are_ignored(model, saved):
    shard(model)
    save_file({NORM: torch.zeros(144)}, model / "model-00003-of-00003.safetensors")
    assert torch.equal(norm_by_transformers(model), HFReader(saved).read(NORM))
    assert torch.equal(HFReader(model).read(NORM), HFReader(saved).read(NORM))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.safetensors", "adapter_model.safetensors is an adapter .LoRA., not a model. Merge it"),
        ("consolidated.safetensors", "consolidated.safetensors is Mistral's own format"),
        ("model.fp16.safetensors", "model.fp16.safetensors is a variant.* Rename it"),
        ("pytorch_model.bin", r"pytorch_model.bin is a pickle, .* convert it: AutoModelForCausalLM.from_pretrained"),
        ("consolidated.00.pth", r"consolidated.00.pth is a pickle"),
        ("model-Q4_K_M.gguf", "model-Q4_K_M.gguf has another format"),
        ("readme.md", "no .safetensors file. Download the model's weights too"),
    ],
)
def test_directories_without_their_own_weights_are_errors(model, name, message):
    (model / SINGLE).rename(model / name)
    refuses(model, message)


def test_adapter_of_peft_is_ambiguous(model):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    refuses(model, "loaders disagree: transformers applies the adapter of adapter_config.json")


def test_file_chosen_by_the_config_is_ambiguous(model):
    config = json.loads((model / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (model / "config.json").write_text(json.dumps(config))
    refuses(
        model, "loaders disagree: transformers reads 'other.safetensors' .transformers_weights of config.json., vLLM"
    )


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "no weight_map .*; found none"),
        ({}, "found an empty one"),
        ([SINGLE], "found a value of type list"),
        (3, "found a value of type int"),
        ({NORM: 3}, f"{NORM} is listed in 3, expected the name of a .safetensors file"),
        ({NORM: None}, f"{NORM} is listed in None, expected"),
        ({NORM: "pytorch_model.bin"}, "is listed in 'pytorch_model.bin', expected the name of a .safetensors file"),
        ({NORM: "a\0.safetensors"}, "expected the name of a .safetensors file"),
        ({NORM: "../model/model.safetensors"}, "is outside the model directory"),
        ({NORM: "x/../../secret.safetensors"}, "is outside the model directory"),
        ({NORM: "/etc/x.safetensors"}, "'/etc/x.safetensors', which is outside the model directory"),
        ({NORM: "gone.safetensors"}, f"{NORM} is listed in gone.safetensors, which is missing"),
        ({"model.extra": SINGLE}, f"model.extra is listed in {SINGLE}, which does not hold it"),
        ({NORM: SINGLE}, "is in model.safetensors, but not in the index"),
    ],
)
def test_damaged_indexes_are_errors(model, weight_map, message):
    write_index(model, weight_map)
    refuses(model, message)


def test_shards_in_a_subdirectory_are_read(model, saved):
    weights = load_file(model / SINGLE)
    (model / "weights").mkdir()
    (model / SINGLE).rename(model / "weights" / SINGLE)
    write_index(model, dict.fromkeys(weights, f"weights/{SINGLE}"))
    assert torch.equal(norm_by_transformers(model), HFReader(saved).read(NORM))
    assert torch.equal(HFReader(model).read(NORM), HFReader(saved).read(NORM))


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(), "b": entry()},
        {"a": entry(offsets=(4, 12))},
        {"a": entry(offsets=(0, 2**63))},
        {"a": entry(shape=(2**40, 2**40))},
        {"a": entry(shape=(-2,))},
        {"a": entry(shape=(3,))},
        {"a": entry("U128")},
        {"a": {}},
        [],
    ],
)
def test_hostile_headers_are_errors(model, header):
    encoded = json.dumps(header).encode()
    (model / SINGLE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
    refuses(model, "model.safetensors: not a complete safetensors file")


def test_huge_header_and_git_lfs_pointer_are_errors(model):
    (model / SINGLE).write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refuses(model, "model.safetensors: not a complete safetensors file .*header too large")
    (model / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuses(model, "model.safetensors: is a Git LFS pointer, not the file itself. Run 'git lfs pull'")


def test_repeated_tensor_in_a_header_is_read_as_loaders_read_it(model):
    """The library keeps the last of two entries with the same name, in every loader."""
    entries = ",".join(f'"a": {json.dumps(entry(shape=shape))}' for shape in ((2,), (1, 2)))
    encoded = f"{{{entries}}}".encode()
    (model / SINGLE).write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(8))
    assert HFReader(model).read("a").shape == (1, 2)


def copy_assets(model: Path, target: Path) -> set[str]:
    target.mkdir()
    model_directory.copy_files(model, target, ASSETS)
    return {path.name for path in target.iterdir()}


@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json", "tokenizer.json", "chat_template.jinja"])
def test_links_that_lead_out_are_errors(model, tmp_path, name):
    (tmp_path / "secret").write_text("private")
    if name == INDEX:
        shard(model)
    (model / name).unlink()
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(QADError, match=f"{name}: leads to .*/secret, which is outside the model directory. Replace"):
        HFReader(model)
        copy_assets(model, tmp_path / "copy")


def test_linked_directories_and_special_files_are_errors(model, tmp_path):
    (tmp_path / "private").mkdir()
    templates = model / "additional_chat_templates"
    templates.symlink_to(tmp_path / "private")
    with pytest.raises(QADError, match="additional_chat_templates: leads to .*/private, which is outside"):
        copy_assets(model, tmp_path / "1")
    templates.unlink()
    templates.mkdir()
    (templates / "again").symlink_to(templates)
    with pytest.raises(QADError, match="again: is not a regular file"):
        copy_assets(model, tmp_path / "2")
    shutil.rmtree(templates)
    (model / "tokenizer.model").symlink_to(model / "gone")
    with pytest.raises(QADError, match="tokenizer.model: is a link to .*/gone, which does not exist"):
        copy_assets(model, tmp_path / "3")
    (model / "tokenizer.model").unlink()
    (model / "tokenizer.model").symlink_to("tokenizer.model")
    with pytest.raises(QADError, match="tokenizer.model: is a link to .*, which does not exist"):
        copy_assets(model, tmp_path / "4")


def test_huggingface_cache_and_linked_directories_are_allowed(model, tmp_path):
    cache = tmp_path / "models--org--tiny"
    revision = cache / "snapshots" / "0123"
    revision.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, path in enumerate(sorted(model.iterdir())):
        path.rename(cache / "blobs" / str(i))
        (revision / path.name).symlink_to(Path("../../blobs") / str(i))
    refuses(cache, "models--org--tiny: is a cache of Hugging Face. Give a directory in .*snapshots")
    (tmp_path / "link").symlink_to(revision)
    for i, directory in enumerate((revision, tmp_path / "link")):
        assert NORM in HFReader(directory).names
        assert {"config.json", "tokenizer.json"} <= copy_assets(directory, tmp_path / f"copy{i}")
    (revision / "tokenizer.json").unlink()
    (revision / "tokenizer.json").symlink_to(tmp_path / "link" / ".." / ".." / "refs")
    (cache / "refs").write_text("x")
    with pytest.raises(QADError, match="tokenizer.json: leads to .*refs, which is outside the model directory"):
        copy_assets(revision, tmp_path / "last")
