"""Shipped policies for the five models of the paper, the printed table, sizes, and the command line."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_qad.checkpoint.layouts import HFTensor, stored_tensors
from megatron_qad.engine import QADError
from megatron_qad.models.families import family_of
from megatron_qad.quantization.format_table import Row, fold_experts, fold_layers, format_rows, render, totals
from megatron_qad.quantization.policy import load
from megatron_qad.quantization.policy_file import SHIPPED
from megatron_qad.report.collect import _model_facts
from megatron_qad.report.policy_report import report_policy, resolve_report

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "tests" / "unit" / "quantization" / "configs"
MODELS = sorted(path.stem for path in CONFIGS.glob("*.json"))
GENERAL = sorted(
    path.stem for path in SHIPPED.glob("*.yaml") if path.stem not in MODELS and not path.stem.startswith("nemotron-3")
)


def read(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def report(name: str, policy: str | None = None, rules=()):
    return resolve_report(read(name), load(policy or name, rules))


def bf16_layers(policy_report) -> dict[str, set[int | None]]:
    """Return the layers that stay in BF16, by kind."""
    layers: dict[str, set] = {}
    for row in policy_report.rows:
        if row.format == "bf16":
            layers.setdefault(row.kind, set()).add(row.layer)
    return layers


def test_every_model_has_a_policy_and_a_config():
    assert len(MODELS) == 5 and all((SHIPPED / f"{name}.yaml").is_file() for name in MODELS)
    assert GENERAL == [
        "bf16", "fp8-all-linear", "nvfp4-all-linear", "nvfp4-mlp-fp8-attention", "nvfp4-mlp-only", "w4a16-all-linear",
    ]  # fmt: skip


@pytest.mark.parametrize("policy", GENERAL)
@pytest.mark.parametrize("name", MODELS)
def test_general_policies_apply_to_dense_hybrid_and_expert_models(name, policy):
    resolved = report(name, policy)
    by_kind = {
        kind: {row.format for row in resolved.rows if row.kind == kind}
        for kind in Counter(r.kind for r in resolved.rows)
    }
    mlp, mixer = {
        "bf16": ("bf16", "bf16"),
        "fp8-all-linear": ("fp8", "fp8"),
        "nvfp4-all-linear": ("nvfp4", "nvfp4"),
        "nvfp4-mlp-only": ("nvfp4", "bf16"),
        "nvfp4-mlp-fp8-attention": ("nvfp4", "fp8"),
        "w4a16-all-linear": ("nvfp4-w4a16", "nvfp4-w4a16"),
    }[policy]
    expected = {"head": "bf16", "attention": mixer, "mamba": mixer, "mlp": mlp, "expert": mlp, "shared_expert": mlp}
    assert by_kind == {kind: {expected[kind]} for kind in by_kind}


@pytest.mark.parametrize("name", ["llama-nemotron-super-49b", "acereason-nemotron-7b", "nemotron-nano-12b-v2-vl"])
def test_all_decoder_linears_are_quantized(name):
    resolved = report(name)
    assert bf16_layers(resolved) == {"head": {None}} and resolved.policy.kv_cache == "bf16"
    assert {row.format for row in resolved.rows} == {"bf16", "nvfp4"}


def test_nano_9b_keeps_attention_and_two_layers_at_each_end_in_bf16():
    resolved = report("nemotron-nano-9b-v2")
    pattern = resolved.layer_pattern
    attention = {i for i, symbol in enumerate(pattern) if symbol == "*"}
    assert attention == {14, 21, 30, 39}
    assert bf16_layers(resolved) == {"attention": attention, "mamba": {0, 54}, "mlp": {1, 55}, "head": {None}}


def test_nano_30b_keeps_attention_and_the_preceding_mamba_layers_in_bf16():
    resolved = report("nemotron-3-nano-30b-a3b")
    attention = {i for i, symbol in enumerate(resolved.layer_pattern) if symbol == "*"}
    assert len(attention) == 6
    assert bf16_layers(resolved) == {"attention": attention, "mamba": {i - 1 for i in attention}, "head": {None}}
    assert {resolved.layer_pattern[i - 1] for i in attention} == {"M"}
    assert resolved.policy.kv_cache == "fp8"
    backbone = "backbone.layers"
    conv = [f"{backbone}.{i}.mixer.conv1d" for i, symbol in enumerate(resolved.layer_pattern) if symbol == "M"]
    mamba = [f"{backbone}.{i - 1}.mixer.{p}" for i in attention for p in ("in_proj", "out_proj")]
    qkvo = [f"{backbone}.{i}.mixer.{p}_proj" for i in attention for p in "qkvo"]
    assert resolved.exclude_modules == sorted([*conv, *mamba, *qkvo, "lm_head"])


def test_model_facts_have_language_model_sizes_but_count_all_weights():
    resolved = report("nemotron-nano-12b-v2-vl")
    facts = _model_facts(resolved.hf_config)
    assert facts["num_weights"] == resolved.num_weights == 13_171_366_912  # vision encoder and projector included
    assert (facts["num_hidden_layers"], facts["hidden_size"], facts["vocab_size"]) == (62, 5120, 131072)


def test_vision_encoder_is_excluded():
    resolved = report("nemotron-nano-12b-v2-vl")
    vision = [name for name in resolved.exclude_modules if not name.startswith("language_model.")]
    assert len(vision) == 32 * 4 + 1 + 2 + 1  # blocks, patch embedding, projector, the head without its prefix
    assert {name.rsplit(".", 1)[-1] for name in resolved.exclude_modules if name not in vision} == {"conv1d", "lm_head"}
    assert not any(row.hf[0].startswith("vision") for row in resolved.rows)


def test_sizes_of_the_packed_models():
    """In 10^9 bytes. For the 9B: 1,972 M weights in BF16 and 6,916 M at 9/16 of a byte give 3.94 + 3.89 = 7.8."""
    sizes = {name: round(report(name).bytes_after / 1e9, 1) for name in MODELS}
    assert sizes == {
        "acereason-nemotron-7b": 5.9,
        "llama-nemotron-super-49b": 31.1,
        "nemotron-3-nano-30b-a3b": 19.3,
        "nemotron-nano-12b-v2-vl": 10.6,
        "nemotron-nano-9b-v2": 7.8,
    }


@pytest.mark.parametrize("fmt", ["bf16", "nvfp4", "nvfp4-w4a16", "fp8"])
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_bytes_after_match_the_exported_tensors(fmt, layout):
    config = {**read("acereason-nemotron-7b"), "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
              "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 32}  # fmt: skip
    linears = family_of(config).linears(config)
    scale = torch.tensor(1e-2)
    for linear, row in zip(linears, format_rows(linears, {x.megatron: fmt for x in linears}), strict=True):
        num_bytes = 0
        for name, shape in zip(linear.hf, linear.hf_shapes(), strict=True):
            item = HFTensor(
                name,
                torch.randn(shape, dtype=torch.bfloat16),
                module=name.removesuffix(".weight"),
                fmt=fmt,
                weight_scale=scale,
                input_scale=scale if fmt in ("nvfp4", "fp8") else None,
                is_fake_quantized=False,
            )
            num_bytes += sum(t.numel() * t.element_size() for t in stored_tensors(item, layout).values())
        assert row.bytes_after == num_bytes


def test_number_of_columns_must_be_a_multiple_of_the_block_size():
    config = {**read("acereason-nemotron-7b"), "num_hidden_layers": 1, "intermediate_size": 18944 + 16}
    resolve_rule = lambda rule: resolve_report(config, load("bf16", [rule]))  # noqa: E731
    resolve_rule("mlp=nvfp4")
    with pytest.raises(QADError, match="linear_fc2.weight has 18960 columns, and int4-w4a16 needs a multiple of 128"):
        resolve_rule("mlp=int4-w4a16")
    config["intermediate_size"] += 8
    with pytest.raises(QADError, match="has 18968 columns, and nvfp4 needs a multiple of 16"):
        resolve_rule("mlp=nvfp4")


def test_tied_head_has_no_size_and_is_excluded():
    config = {**read("acereason-nemotron-7b"), "tie_word_embeddings": True}
    resolved = resolve_report(config, load("acereason-nemotron-7b"))
    assert (resolved.rows[-1].kind, resolved.rows[-1].bytes_before, resolved.rows[-1].bytes_after) == ("head", 0, 0)
    assert resolved.exclude_modules == ["lm_head"]
    assert "output_layer (tied to the embedding)" in "\n".join(resolved.lines())
    untied = report("acereason-nemotron-7b")
    assert untied.bytes_after - resolved.bytes_after == 2 * 152064 * 3584


def test_formats_that_not_every_layout_holds_are_pointed_out():
    text = "\n".join(report("acereason-nemotron-7b", rules=["mlp=int4-w4a16"]).lines())
    assert "int4-w4a16: exported by --layout compressed-tensors only" in text
    assert "exported by" not in "\n".join(report("acereason-nemotron-7b").lines())


def expert(index: int, fmt: str = "nvfp4", layer: int = 3) -> Row:
    name = f"decoder.layers.{layer}.mlp.experts.experts.{index}.linear_fc1"
    return Row(layer, "expert", name, (f"e{index}",), (32, 16), fmt, 1024, 296)


def test_experts_that_differ_only_in_index_share_a_row():
    rows = [*(expert(i, "bf16" if i == 2 else "nvfp4") for i in range(6)), expert(0, layer=4)]
    folded = fold_experts(rows)
    assert [(row.layer, row.module.split("experts.experts.")[1], row.num) for row in folded] == [
        (3, "{0..1,3..5}.linear_fc1", 5),
        (3, "2.linear_fc1", 1),
        (4, "0.linear_fc1", 1),
    ]
    assert folded[0].bytes_before == 5 * 1024 and folded[0].bytes_after == 5 * 296
    assert totals(folded) == totals(rows) and totals(rows)["nvfp4"].num_linears == 6
    assert "5 x 32 x 16" in "\n".join(render(rows))


def test_table_of_a_large_model_is_folded_and_json_is_complete():
    resolved = report("nemotron-3-nano-30b-a3b")
    lines = list(resolved.lines())
    assert len(lines) < 250
    assert sum("experts.experts.{0..127}.linear_fc1" in line for line in lines) == 23
    data = json.loads(json.dumps(resolved.as_json()))
    assert len(data["linears"]) == len(resolved.rows) == 2 * (23 + 128 * 23 + 23 + 6) + 1
    assert data["exclude_modules"] == resolved.exclude_modules and data["kv_cache"] == "fp8"
    assert sum(line["bytes_after"] for line in data["linears"]) == sum(
        t["bytes_after"] for t in data["totals"].values()
    )
    assert data["bytes_before"] == 2 * 31_577_940_288


def tool(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "inspect_policy.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_command_line_needs_only_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(read("nemotron-nano-9b-v2")))
    model = ("--hf-model", str(tmp_path), "--policy", "nemotron-nano-9b-v2")
    done = tool(*model, "--json", "--rule", "head=fp8", "kv_cache=fp8")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["kv_cache"] == "fp8" and data["linears"][-1]["format"] == "fp8"
    assert "lm_head" not in data["exclude_modules"]
    failed = tool(*model, "--rule", "kind:mamba,before:atention=bf16")
    assert failed.returncode == 1 and failed.stdout == ""
    assert "error: --rule kind:mamba,before:atention=bf16: unknown kind of layer 'atention'" in failed.stderr


def test_missing_config_is_an_error(tmp_path):
    with pytest.raises(QADError, match="no config.json. Give the directory of a Hugging Face model"):
        report_policy(tmp_path, "bf16")


@pytest.mark.parametrize("name", MODELS)
def test_folded_layers_have_the_same_totals(name):
    rows = report(name).rows
    folded = fold_layers(rows)
    assert len(folded) < len(fold_experts(rows)) / 2
    assert totals(folded) == totals(rows) and sum(row.num for row in folded) == len(rows)


def test_folded_layers_are_named():
    table = "\n".join(render(fold_layers(report("nemotron-3-nano-30b-a3b").rows)))
    assert re.search(
        r"^ *17 of 0\.\.50 +mamba +decoder\.layers\.\*\.mixer\.in_proj +17 x 10304 x 2688 +nvfp4", table, re.M
    )
    assert re.search(r"expert +decoder\.layers\.\*\.mlp\.experts\.experts\.\{0\.\.127\}\.linear_fc1 +2944 x ", table)
