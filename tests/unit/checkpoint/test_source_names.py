"""Names under which tensors of a model are found: base models, tied heads, tensors that are stored twice."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_qad.checkpoint import source_names
from megatron_qad.checkpoint.hf_reader import HFReader
from megatron_qad.engine.errors import QADError
from megatron_qad.models.families import family_of

sys.path.append(str(Path(__file__).parents[2] / "dist"))  # tiny_hybrids, tiny_job

import tiny_hybrids  # noqa: E402
import tiny_job  # noqa: E402

DENSE = tiny_job.LLAMA | {"torch_dtype": "float32"}
QWEN2 = DENSE | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = DENSE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
VL = {
    "architectures": ["NemotronH_Nano_VL_V2"],
    "llm_config": tiny_hybrids.CASES["attention"],
    "vision_config": {"num_hidden_layers": 1, "intermediate_size": 8, "max_resolution": 32},
    "vit_hidden_size": 8,
    "projector_hidden_size": 8,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tied(config: dict) -> dict:
    return config | {"tie_word_embeddings": True}


def write(directory: Path, config: dict, change=None) -> Path:
    tiny_job.write_hf(directory, config)
    if change is not None:
        weights = load_file(directory / "model.safetensors")
        save_file(change(weights) or weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def resolved(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a directory by the names that the family expects."""
    reader = HFReader(directory)
    maps = family_of(reader.config).tensors(reader.config)
    source_names.resolve(reader, maps)
    return {name: reader.read(name) for m in maps for name in m.hf}


def without(weights: dict, prefix: str) -> dict:
    return {name.replace(f"{prefix}.", "", 1): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("config", [DENSE, QWEN2, QWEN3, *(tiny_hybrids.CASES[c] for c in ("nemotron-h", "qwen3-moe"))])
def test_base_model_of_transformers_is_found(tmp_path, config):
    """AutoModel saves the model without its head: names without prefix, and another architecture."""
    config = tied(config)
    whole = write(tmp_path / "whole", config)
    expected = resolved(whole)
    base = transformers.AutoModel.from_pretrained(whole, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    saved = json.loads((tmp_path / "base" / "config.json").read_text())
    assert saved["architectures"][0].endswith("Model") and not set(
        load_file(tmp_path / "base/model.safetensors")
    ) & set(expected)
    found = resolved(tmp_path / "base")
    assert found.keys() == expected.keys() and len(found) > 10
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("config", "prefix"),
    [(tied(tiny_hybrids.NEMOTRON_NAS), "model"), (VL, "backbone"), (tied(tiny_hybrids.NEMOTRON_H), "backbone")],
)
def test_base_models_that_transformers_cannot_build_are_found(tmp_path, config, prefix):
    expected = resolved(write(tmp_path / "whole", config))
    found = resolved(write(tmp_path / "base", config, lambda weights: without(weights, prefix)))
    assert not any(f"{prefix}." in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_alias_of_transformers_is_found_in_a_base_model(tmp_path):
    config = tied(tiny_hybrids.NEMOTRON_H)

    def change(weights):
        weights = without(weights, "backbone")
        return weights | {"embedding.weight": weights.pop("embeddings.weight")}

    assert "backbone.embeddings.weight" in resolved(write(tmp_path / "base", config, change))


def test_names_of_transformers_modules_are_found(tmp_path):
    """Without transformers' conversion on saving, as a training script may write them."""

    def change(weights):
        return {name.replace("backbone.", "model."): tensor for name, tensor in weights.items()}

    expected = resolved(write(tmp_path / "hub", tiny_hybrids.CASES["attention"]))
    directory = write(tmp_path / "hf", tiny_hybrids.CASES["attention"], change)
    loaded = tiny_hybrids.by_transformers(directory).state_dict()
    found = resolved(directory)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and torch.equal(loaded[name.replace("backbone.", "model.")], tensor)


@pytest.mark.parametrize("config", [DENSE, tiny_hybrids.NEMOTRON_H])
def test_base_model_without_a_head_is_an_error(tmp_path, config):
    def change(weights):
        weights = without(without(weights, "model"), "backbone")
        del weights[HEAD]
        return weights

    with pytest.raises(
        QADError, match=f"{HEAD} is missing, and config.json does not tie it .* A base model .saved by Au"
    ):
        resolved(write(tmp_path / "base", config, change))


def test_missing_head_of_a_wrapper_is_an_error(tmp_path):
    def change(weights):
        del weights["language_model.lm_head.weight"]

    with pytest.raises(QADError, match="language_model.lm_head.weight is missing, and config.json does not tie it"):
        resolved(write(tmp_path / "vl", VL, change))


def test_tied_head_that_differs_is_an_error(tmp_path):
    """transformers 5 uses the stored head, vLLM the embedding."""
    config = tied(DENSE)
    directory = write(tmp_path / "hf", config, lambda weights: weights | {HEAD: weights[EMBEDDING] * 2})
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, 2 * model.model.embed_tokens.weight)
    pattern = f"{HEAD} and {EMBEDDING} have different values, but tie_word_embeddings is true, and loaders disagree"
    with pytest.raises(QADError, match=pattern):
        resolved(directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tied_head_that_is_equal_is_accepted(tmp_path, dtype):
    config = tied(DENSE)
    directory = write(
        tmp_path / "hf", config, lambda weights: weights | {HEAD: weights[EMBEDDING].to(dtype, copy=True)}
    )
    assert HEAD not in resolved(directory)


def test_tied_head_may_be_stored_instead_of_the_embedding(tmp_path):
    def change(weights):
        weights[HEAD] = weights.pop(EMBEDDING)

    expected = resolved(write(tmp_path / "whole", tied(DENSE)))
    directory = write(tmp_path / "hf", tied(DENSE), change)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert torch.equal(loaded.model.embed_tokens.weight, expected[EMBEDDING])
    assert torch.equal(resolved(directory)[EMBEDDING], expected[EMBEDDING])


ALIASES = [
    (tiny_hybrids.NEMOTRON_H, "backbone.embedding.weight", "backbone.embeddings.weight"),
    (DENSE, "norm.weight", "model.norm.weight"),
]


@pytest.mark.parametrize(("config", "alias", "name"), ALIASES)
def test_tensor_under_two_names_must_be_the_same(tmp_path, config, alias, name):
    resolved(write(tmp_path / "same", config, lambda weights: weights | {alias: weights[name].clone()}))
    directory = write(tmp_path / "differ", config, lambda weights: weights | {alias: weights[name] * 2})
    with pytest.raises(QADError, match=f"{alias} and {name} have different values, but these are names of one tensor"):
        resolved(directory)


def test_computed_buffers_are_ignored(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert name not in resolved(write(tmp_path / "hf", DENSE, lambda weights: weights | {name: torch.ones(8)}))


@pytest.mark.parametrize(
    ("prefix", "advice"),
    [
        ("_orig_mod.", "Remove the prefix '_orig_mod.' from the names"),
        ("base_model.model.", "Remove the prefix 'base_model.model.' from the names"),
        ("x.", "Check the architecture in config.json"),
    ],
)
def test_unknown_prefixes_are_named(tmp_path, prefix, advice):
    def change(weights):
        for name in list(weights):
            weights[prefix + (name if prefix != "x." else f"{name}.y")] = weights.pop(name)

    with pytest.raises(QADError, match=f"21 tensors are not part of the model, first '{prefix}.*{advice}"):
        resolved(write(tmp_path / "hf", DENSE, change))
