"""Validator: exports of every family and layout are valid, and every kind of damage is reported."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_configs import TINY_HYBRID

from megatron_qad.checkpoint.validate import validate_nvfp4
from megatron_qad.engine.errors import QADError
from megatron_qad.engine.run_directory import json_records

sys.path.insert(0, str(Path(__file__).parent))
from exported import (  # noqa: E402  (a helper module in this directory)
    CONFIG,
    DOWN,
    FAMILIES,
    UP,
    K,
    Q,
    V,
    drop,
    edit,
    edit_json,
    export,
    issues,
    linears,
    poke,
    put,
)

INDEX = "model.safetensors.index.json"
NEMOTRON_H = {k: v for k, v in TINY_HYBRID.items() if k != "hybrid_override_pattern"}
NEMOTRON_H |= {"model_type": "nemotron_h", "head_dim": 16}


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exports_are_valid(tmp_path, layout, family):
    config = FAMILIES[family]
    for name, kwargs in (("one", {}), ("many", {"max_shard_bytes": 3000})):
        result = validate_nvfp4(export(tmp_path / name, layout, config, **kwargs))
        assert not result.issues, "\n".join(map(str, result.issues))
        assert result.layout == layout and len(result.quantized) == 14 and result.num_linears == 15
        assert "valid" in result.summary() and str(result.num_bytes) in result.summary()
    mixed = export(tmp_path / "mixed", layout, config, ("lm_head", *linears(config)[1:8], DOWN))
    assert issues(mixed) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_inventory_matches_transformers(family):
    """Names and shapes of the inventory are those of transformers' model classes."""
    transformers = pytest.importorskip("transformers")
    from megatron_qad.checkpoint.expected_tensors import inventory

    config = FAMILIES[family]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    ours = inventory(config)
    expected_shapes = {**ours.tensors, **{f"{module}.weight": shape for module, shape in ours.linears.items()}}
    model_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected_shapes == model_shapes
    assert set(ours.linears) == {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


MODELOPT_DAMAGE = {
    # Accepted silently by vLLM.
    "weight_scale_2 missing": (drop(f"{DOWN}.weight_scale_2"), f"{DOWN}.weight_scale_2: is missing"),
    "input_scale missing": (drop(f"{DOWN}.input_scale"), f"{DOWN}.input_scale: is missing"),
    "weight_scale as U8": (
        put(f"{DOWN}.weight_scale", lambda t: t.view(torch.uint8)),
        f"{DOWN}.weight_scale: is U8, expected F8_E4M3",
    ),
    # Scales of fused linears must be equal.
    "q differs from k and v": (put(f"{K}.weight_scale_2", lambda t: t * 1.0000002), f"{K}.weight_scale_2: is "),
    "v input differs": (put(f"{V}.input_scale", lambda t: t * 1.5), f"{V}.input_scale: is "),
    "up differs from gate": (put(f"{UP}.weight_scale_2", lambda t: t * 2), f"{UP}.weight_scale_2: is "),
    # Scales.
    "scale NaN": (put(f"{DOWN}.weight_scale_2", torch.tensor(float("nan"))), f"{DOWN}.weight_scale_2: is nan"),
    "scale zero": (put(f"{DOWN}.weight_scale_2", torch.tensor(0.0)), f"{DOWN}.weight_scale_2: is 0.0"),
    "scale negative": (put(f"{DOWN}.input_scale", torch.tensor(-1.0)), f"{DOWN}.input_scale: is -1.0"),
    "scale infinite": (put(f"{DOWN}.input_scale", torch.tensor(float("inf"))), f"{DOWN}.input_scale: is inf"),
    "scale of shape [1]": (
        put(f"{DOWN}.weight_scale_2", lambda t: t.reshape(1)),
        f"{DOWN}.weight_scale_2: has shape [1], expected []",
    ),
    "scale BF16": (put(f"{DOWN}.input_scale", lambda t: t.bfloat16()), f"{DOWN}.input_scale: is BF16, expected F32"),
    "block scale 0x7F": (poke(f"{DOWN}.weight_scale", 0x7F), f"{DOWN}.weight_scale: has 1 NaN"),
    "block scale 0xFF": (poke(f"{DOWN}.weight_scale", 0xFF), f"{DOWN}.weight_scale: has 1 NaN"),
    "block scale zero": (
        poke(f"{DOWN}.weight_scale", 0x00),
        f"{DOWN}.weight_scale: has 1 block scales that are zero",
    ),
    "block scale minus zero": (
        poke(f"{DOWN}.weight_scale", 0x80),
        f"{DOWN}.weight_scale: has 1 block scales that are",
    ),
    "block scale negative": (poke(f"{DOWN}.weight_scale", 0xB8), f"{DOWN}.weight_scale: has 1 negative"),
    "block scales transposed": (
        put(f"{DOWN}.weight_scale", lambda t: t.t().contiguous()),
        f"{DOWN}.weight_scale: has shape [3, 32], expected [32, 3]",
    ),
    # Weights and names.
    "packed weight missing": (drop(f"{DOWN}.weight"), f"{DOWN}.weight: is missing"),
    "packed weight too wide": (
        put(f"{DOWN}.weight", lambda t: torch.cat([t, t], 1)),
        f"{DOWN}.weight: has shape [32, 48], expected [32, 24]",
    ),
    "weight in BF16 with scales": (
        put(f"{DOWN}.weight", torch.zeros(32, 48, dtype=torch.bfloat16)),
        f"{DOWN}.weight: is BF16, expected U8",
    ),
    "norm missing": (drop("model.norm.weight"), "model.norm.weight: is missing"),
    "norm NaN": (
        put("model.norm.weight", lambda t: t * float("nan")),
        "model.norm.weight: has 32 NaN",
    ),
    "norm F32": (put("model.norm.weight", lambda t: t.float()), "model.norm.weight: is F32, expected BF16"),
    "embedding padded": (
        put("model.embed_tokens.weight", lambda t: torch.cat([t, t[:8]])),
        "model.embed_tokens.weight: has shape [48, 32], expected [40, 32]",
    ),
    "unknown tensor": (
        put("model.layers.1.mlp.down_proj.bias", torch.zeros(32)),
        f"{DOWN}.bias: is not a tensor of this model",
    ),
    "third layer": (
        put("model.layers.2.input_layernorm.weight", torch.zeros(32)),
        "model.layers.2.input_layernorm.weight",
    ),
}


@pytest.mark.parametrize("case", MODELOPT_DAMAGE)
def test_damaged_tensor_is_reported(tmp_path, case):
    directory = export(tmp_path / "out", "modelopt")
    change, text = MODELOPT_DAMAGE[case]
    edit(directory, change)
    reported = issues(directory)
    assert any(issue.startswith(text) for issue in reported), reported


def unpack_k(tensors):
    """k_proj becomes BF16 while q and v stay NVFP4."""
    for part in ("weight_scale", "weight_scale_2", "input_scale"):
        tensors.pop(f"{K}.{part}")
    tensors[f"{K}.weight"] = torch.zeros(16, 32, dtype=torch.bfloat16)


def test_partly_quantized_fused_group_is_reported(tmp_path):
    directory = export(tmp_path / "out", "modelopt")
    edit(directory, unpack_k)
    reported = issues(directory)
    assert any(issue.startswith(f"{Q}: is quantized, but {K} not") for issue in reported), reported
    assert any(issue.startswith(f"{K}: is not quantized, but missing from config.json ignore") for issue in reported)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"])
def test_compressed_tensors_missing_parts_are_reported(tmp_path, part):
    directory = export(tmp_path / "out", "compressed-tensors")
    edit(directory, drop(f"{DOWN}.{part}"))
    reported = issues(directory)
    assert len(reported) == 1 and reported[0].startswith(f"{DOWN}.{part}: is missing"), reported


def test_compressed_tensors_fused_scales_and_unknown_names_are_reported(tmp_path):
    directory = export(tmp_path / "out", "compressed-tensors")
    edit(directory, put(f"{V}.weight_global_scale", lambda t: t * 2))
    edit(directory, put(f"{DOWN}.weight_scale_2", torch.tensor(1.0)))  # a name of the modelopt layout
    reported = issues(directory)
    assert any(issue.startswith(f"{V}.weight_global_scale: is") and "servers fuse them" in issue for issue in reported)
    assert any(issue.startswith(f"{DOWN}.weight_scale_2: is not a tensor") for issue in reported)


def config_change(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(config):
        for key in keys:
            config = config[key]
        if value is None:
            config.pop(last)
        else:
            config[last] = value

    return change


QC = "quantization_config"
CONFIG_DAMAGE = {
    "layer missing from both": ("modelopt", None, [], "lm_head: is not quantized, but missing from config.json ignore"),
    "quantized layer excluded": ("modelopt", None, ["lm_head", DOWN], f"{DOWN}: is quantized, but listed in"),
    "wildcard": ("modelopt", None, ["lm_head", "model.layers.1*"], "model.layers.1*: is listed in config.json ignore"),
    "embedding excluded": ("modelopt", None, ["lm_head", "model.embed_tokens"], "model.embed_tokens: is listed in"),
    "lists differ": ("modelopt", config_change(QC, "ignore", []), None, "hf_quant_config.json: exclude_modules and"),
    "algorithm": (
        "modelopt",
        config_change(QC, "quant_algo", "FP8"),
        None,
        "config.json: quantization_config.quant_algo",
    ),
    "no method": (
        "modelopt",
        config_change(QC, "quant_method", None),
        None,
        "config.json: quantization_config.quant_m",
    ),
    "kv cache": (
        "modelopt",
        config_change(QC, "kv_cache_quant_algo", "FP8"),
        None,
        "hf_quant_config.json: quantization.kv",
    ),
    "no config": (
        "modelopt",
        config_change(QC, None),
        None,
        "config.json: quantization_config.quant_method is None, so the model is not",
    ),
    "family": (
        "modelopt",
        config_change("model_type", "mamba"),
        None,
        "config.json: config.json: model_type is 'mamba'",
    ),
    "hidden size": ("modelopt", config_change("hidden_size", "many"), None, "config.json: config.json: hidden_size"),
    "dtype": ("modelopt", config_change("dtype", "fp8"), None, "config.json: dtype is 'fp8'"),
    "no architecture": ("modelopt", config_change("architectures", None), None, "config.json: architectures is None"),
    "unhashable family": (
        "modelopt",
        config_change("model_type", []),
        None,
        "config.json: config.json: model_type is []",
    ),
    "no groups": (
        "modelopt",
        config_change(QC, "config_groups", []),
        None,
        "config.json: quantization_config.config_gr",
    ),
    "tied": ("modelopt", config_change("tie_word_embeddings", True), None, "lm_head.weight: differs from model.embed"),
    "scale_dtype missing": (
        "compressed-tensors",
        config_change(QC, "config_groups", "group_0", "input_activations", "scale_dtype", None),
        None,
        "config.json: config_groups input_activations.scale_dtype is None",
    ),
    "no activations": (
        "compressed-tensors",
        config_change(QC, "config_groups", "group_0", "input_activations", None),
        None,
        "config.json: config_groups input_activations.num_bits is None",
    ),
    "group size": (
        "compressed-tensors",
        config_change(QC, "config_groups", "group_0", "weights", "group_size", 32),
        None,
        "config.json: config_groups weights.group_size is 32",
    ),
    "format": (
        "compressed-tensors",
        config_change(QC, "format", "dense"),
        None,
        "config.json: quantization_config.format",
    ),
    "ignore empty": (
        "compressed-tensors",
        config_change(QC, "ignore", []),
        None,
        "lm_head: is not quantized, but missing",
    ),
}


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_wrong_configuration_is_reported(tmp_path, case):
    layout, change, exclude, text = CONFIG_DAMAGE[case]
    directory = export(tmp_path / "out", layout)
    if exclude is not None:  # in both files
        edit_json(directory / "config.json", config_change(QC, "ignore", exclude))
        edit_json(directory / "hf_quant_config.json", config_change("quantization", "exclude_modules", exclude))
    else:
        edit_json(directory / "config.json", change)
    reported = issues(directory)
    assert any(issue.startswith(text) for issue in reported), reported


@pytest.mark.parametrize("key", ["quant_algo", "kv_cache_quant_algo", "exclude_modules", "group_size"])
def test_missing_keys_of_hf_quant_config_are_reported(tmp_path, key):
    directory = export(tmp_path / "out", "modelopt")
    edit_json(directory / "hf_quant_config.json", config_change("quantization", key, None))
    assert any(issue.startswith(f"hf_quant_config.json: has no quantization.{key}") for issue in issues(directory))
    (directory / "hf_quant_config.json").unlink()
    assert issues(directory) == ["hf_quant_config.json: is missing"]


def test_damaged_files_are_reported(tmp_path):
    def fresh(name):
        directory = export(tmp_path / name, "modelopt", max_shard_bytes=3000)
        return directory, sorted(directory.glob("*.safetensors"))

    directory, shards = fresh("truncated")
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    assert any(issue.startswith(f"{shards[1].name}: has ") and "truncated" in issue for issue in issues(directory))
    header = shards[1].read_bytes()[:200]
    for offset, junk in ((8, b"["), (8, b'{"a":1}'.ljust(190)), (0, b"\xff" * 8)):
        shards[1].write_bytes(header[:offset] + junk + header[offset + len(junk) :])
        assert any(issue.startswith(f"{shards[1].name}: ") for issue in issues(directory))
    for size in (0, 5, 40):
        shards[1].write_bytes(shards[1].read_bytes()[:size])
        assert any(issue.startswith(f"{shards[1].name}: is truncated") for issue in issues(directory))

    directory, shards = fresh("missing")
    shards[0].unlink()
    reported = issues(directory)
    assert f"{shards[0].name}: is listed in {INDEX}, but missing" in reported
    assert any(issue.startswith("model.embed_tokens.weight: is listed in") for issue in reported)

    directory, shards = fresh("index")
    edit_json(directory / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert any("model.norm.weight: is in" in f and "loaders will not find it" in f for f in issues(directory))
    edit_json(directory / INDEX, lambda index: index["metadata"].update(total_size=7))
    assert any(f.startswith(f"{INDEX}: has total_size 7") for f in issues(directory))
    (directory / INDEX).write_text("{")
    assert any(f.startswith(f"{INDEX}: not valid JSON") for f in issues(directory))
    (directory / INDEX).unlink()
    assert any("has neither" in f for f in issues(directory))

    directory, shards = fresh("stray")
    save_file({"x": torch.zeros(1)}, directory / "old.safetensors")
    save_file({"x": torch.zeros(1)}, directory / "model.safetensors")
    reported = issues(directory)
    assert "old.safetensors: is a shard that is not in the index" in reported
    assert any(f.startswith("model.safetensors: exists together with") for f in reported)


def test_quantized_tied_head_is_reported(tmp_path):
    config = {**CONFIG, "tie_word_embeddings": True}
    directory = export(tmp_path / "out", "modelopt", unquantized=())
    edit_json(directory / "config.json", lambda value: value.update(tie_word_embeddings=True))
    assert any(issue.startswith("lm_head: is quantized, but tied") for issue in issues(directory))
    # A stored copy of the embedding is valid.
    directory = export(tmp_path / "copy", "modelopt", config)
    edit(directory, lambda t: t.__setitem__("lm_head.weight", t["model.embed_tokens.weight"].clone()))
    assert issues(directory) == []


def test_command_line_prints_issues_and_exits_with_1(tmp_path):
    root = Path(__file__).resolve().parents[3]
    directory = export(tmp_path / "out", "modelopt")

    def run(*arguments):
        command = [sys.executable, str(root / "tools/validate_nvfp4.py"), *map(str, arguments)]
        environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    valid = run(directory)
    assert valid.returncode == 0 and "valid; layout modelopt" in valid.stdout, valid.stderr
    edit(directory, drop(f"{DOWN}.input_scale"))
    edited = run(directory)
    assert edited.returncode == 1 and "ISSUE model.safetensors: has changed" in edited.stdout
    damaged = run(directory, "--no-sums")
    assert damaged.returncode == 1 and f"ISSUE {DOWN}.input_scale: is missing" in damaged.stdout
    assert "1 issue" in damaged.stdout
    assert issues(tmp_path / "nowhere") == [
        f"{tmp_path / 'nowhere'}: is not a directory; expected an exported checkpoint"
    ]
    (tmp_path / "run" / "hf").mkdir(parents=True)
    (tmp_path / "run" / "hf" / "config.json").write_text("{}")
    assert issues(tmp_path / "run") == [
        f"{tmp_path / 'run'}: is a Megatron checkpoint; expected an exported one (megatron-qad export)"
    ]


@pytest.mark.parametrize(
    "blocks",
    [["mamba", "moe", "attention", "mlp"], ["linear_attention", "moe", "full_attention", "mlp"]],
    ids=["hub", "transformers"],
)
def test_layers_block_type_matches_hybrid_override_pattern(blocks):
    """transformers 5 writes ``layers_block_type`` instead of ``hybrid_override_pattern``; both are supported."""
    from megatron_qad.checkpoint.expected_tensors import inventory

    pattern = NEMOTRON_H | {"hybrid_override_pattern": "ME*-"}
    block_types = {k: v for k, v in NEMOTRON_H.items() if k != "head_dim"}
    block_types |= {"layers_block_type": blocks, "attention_head_dim": 16}
    assert inventory(block_types) == inventory(pattern)
    assert inventory(block_types).linears["backbone.layers.2.mixer.k_proj"] == (2 * 16, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "hybrid_override_pattern is None"),
        ({"hybrid_override_pattern": "MX"}, "hybrid_override_pattern is 'MX', expected one of M, "),
        ({"layers_block_type": ["mamba", "rnn"]}, "layers_block_type is .*'rnn'.*, expected one of mamba, "),
        ({"layers_block_type": [["mamba"]]}, "layers_block_type is "),
        ({"layers_block_type": "mamba"}, "layers_block_type is 'mamba'"),
    ],
)
def test_unknown_layers_of_a_hybrid_are_an_error(changes, message):
    from megatron_qad.checkpoint.expected_tensors import inventory

    with pytest.raises(QADError, match=message):
        inventory(NEMOTRON_H | changes)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_changed_files_are_reported_with_both_ways_out(tmp_path, layout):
    directory = export(tmp_path / "out", layout)
    assert issues(directory, with_sums=True) == []
    (directory / "README.md").write_text("a model card")  # added later
    assert issues(directory, with_sums=True) == []
    for name in ("model.safetensors", "config.json"):
        content = bytearray((directory / name).read_bytes())
        content[-1] ^= 1 if name.startswith("model") else ord("\n") ^ ord(" ")
        (directory / name).write_bytes(content)
    changed = "has changed since it was written (another SHA-256). Export again, or pass --no-sums if files were edited"
    reported = issues(directory, with_sums=True)
    assert [
        issue.startswith(f"{name}: {changed}") for issue, name in zip(reported, ("config.json", "model"), strict=True)
    ]
    assert issues(directory) == []
    (directory / "config.json").unlink()
    assert any(issue.startswith("config.json: is missing. Export again") for issue in issues(directory, with_sums=True))


def test_a_missing_or_damaged_record_is_reported(tmp_path):
    directory = export(tmp_path / "out", "modelopt")
    edit_json(directory / "qad_export.json", lambda record: record["content"].pop("files"))
    (issue,) = issues(directory, with_sums=True)
    assert issue.startswith("qad_export.json: is damaged (its content has a different SHA-256")
    json_records.write(directory / "qad_export.json", {"iteration": 1})
    (issue,) = issues(directory, with_sums=True)
    assert issue.startswith("qad_export.json: lists no files with their SHA-256")
    (directory / "qad_export.json").unlink()
    (issue,) = issues(directory, with_sums=True)
    assert issue.startswith("qad_export.json: is missing, so changes of files") and "--no-sums" in issue
    assert issues(directory) == []


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_experts_of_a_layer_must_have_one_format(tmp_path, layout):
    """One expert in BF16 leaves vLLM's fused method for the complete layer without its scales."""
    config = TINY_HYBRID | {"model_type": "nemotron_h"}
    experts = [module for module in linears(config) if ".experts." in module]

    def mixed_formats(unquantized):
        directory = export(tmp_path / unquantized[-1], layout, config, ("lm_head", *unquantized))
        return [issue for issue in issues(directory) if "one format for all experts" in issue]

    assert mixed_formats(experts) == []
    one = [module for module in experts if ".experts.1." in module]
    (issue,) = mixed_formats(one)
    assert issue.startswith(f"{one[0]}: is bf16, but {experts[0]} is nvfp4 (2 of 6 linears")
